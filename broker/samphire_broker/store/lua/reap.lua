-- reap: return a lost worker's messages to the heads of their lists.
-- With: attempts
-- KEYS  1 worker:<wid>   2 worker:<wid>:info   3 worker:<wid>:inflight   4 worker:<wid>:started   5 workers
--       6 tried   7 alone
-- ARGV  1 wid   2 value of the lease's counter when its connection was last missed ("" if only a lapsed lease
--       counts)   3 prefix of result keys   4 prefix of task hashes   5 lifetime of task hashes in s
--       6 what to write of the attempts that were lost (JSON)
-- A lease that has beaten since then belongs to a worker that lives: nothing happens.
-- Returns {messages returned, of them started, messages left for the next call}; {-1, 0, 0} if it lives. What cannot be
-- returned (keys of other types lie where it belongs) stays, and with it the worker among the others.
local beat = call('GET', KEYS[1])
if beat and beat ~= ARGV[2] then
  return {-1, 0, 0}
end
local fields = call('HKEYS', KEYS[3])
local function number(field)
  return tonumber(match(field, '^%d+'))
end
-- The last claimed goes back first, so the order is kept.
table.sort(fields, function(a, b) return number(a) > number(b) end)
local refusal = denied({
  {'RPUSH', CELERY .. (fields[1] and list_of(fields[1]) or 'inference'), ''}, {'HDEL', KEYS[3], 'field'},
  {'HDEL', KEYS[4], 'field'}, {'DEL', KEYS[1]}, {'DEL', KEYS[2]}, {'DEL', KEYS[4]},
  {'SREM', KEYS[5], ARGV[1]}, {'DEL', ARGV[3] .. 'id'}})
if refusal then
  return refusal
end
call('HLEN', KEYS[4])
call('SCARD', KEYS[5])
call('DEL', KEYS[1], KEYS[2])
local alone = try('GET', KEYS[7])
if type(alone) == 'string' and string.sub(alone, 1, #ARGV[1] + 1) == ARGV[1] .. ' ' then
  try('DEL', KEYS[7])
end
local moved, started, looked = 0, 0, 0
local bytes_left = CALL_BYTES
while looked < math.min(#fields, 1000) and bytes_left > 0 do
  looked = looked + 1
  local field = fields[looked]
  local message = call('HGET', KEYS[3], field)
  if push('RPUSH', list_of(field), message) then
    bytes_left = bytes_left - #message
    local id = call('HGET', KEYS[4], field)
    if id then
      -- Only what had started may have been the cause: it counts as an attempt.
      note_attempt(ARGV[4] .. id, KEYS[6], id, ARGV[6], {'attempts', 'crashes'}, ARGV[5])
      if state_in(try('GET', ARGV[3] .. id)) == 'STARTED' then
        try('DEL', ARGV[3] .. id)
      end
      call('HDEL', KEYS[4], field)
      started = started + 1
    end
    call('HDEL', KEYS[3], field)
    moved = moved + 1
  end
end
if call('HLEN', KEYS[3]) == 0 then
  call('DEL', KEYS[4])
  call('SREM', KEYS[5], ARGV[1])
end
return {moved, started, #fields - looked}
