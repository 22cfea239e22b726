-- reap: return a lost worker's messages to the heads of their lists.
-- With: attempts, log
-- KEYS  1 worker:<wid>   2 worker:<wid>:info   3 worker:<wid>:inflight   4 worker:<wid>:started   5 workers
--       6 tried   7 alone
-- ARGV  1 wid   2 value of the lease's counter when its connection was last missed ("" if only a lapsed lease
--       counts)   3 prefix of result keys   4 prefix of task hashes   5 lifetime of task hashes in s
--       6 what to write of the attempts that were lost (JSON)
-- A lease that has beaten since then belongs to a worker that lives: nothing happens.
-- Returns {messages returned, of them started, messages left for the next call}; {-1, 0, 0} if it lives. What cannot be
-- returned (keys of other types lie where it belongs) stays, and with it the worker among the others.
local lease_key, info_key, inflight_key, started_key, workers_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local tried_key, alone_key = KEYS[6], KEYS[7]
local worker_id, missed_beat, meta_prefix, task_prefix, task_ttl_s = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local lost_attempt = ARGV[6]
local beat = call('GET', lease_key)
if beat and beat ~= missed_beat then
  return {-1, 0, 0}
end
local fields = call('HKEYS', inflight_key)
local function number(field)
  return tonumber(match(field, '^%d+'))
end
-- The last claimed goes back first, so the order is kept.
table.sort(fields, function(a, b) return number(a) > number(b) end)
local refusal = denied({
  {'RPUSH', CELERY .. (fields[1] and list_of(fields[1]) or 'inference'), ''}, {'HDEL', inflight_key, 'field'},
  {'HDEL', started_key, 'field'}, {'DEL', lease_key}, {'DEL', info_key}, {'DEL', started_key},
  {'SREM', workers_key, worker_id}, {'DEL', meta_prefix .. 'id'}})
if refusal then
  return refusal
end
call('HLEN', started_key)
call('SCARD', workers_key)
call('DEL', lease_key, info_key)
local alone = try('GET', alone_key)
if type(alone) == 'string' and string.sub(alone, 1, #worker_id + 1) == worker_id .. ' ' then
  try('DEL', alone_key)
end
local moved, started, looked = 0, 0, 0
local bytes_left = CALL_BYTES
while looked < math.min(#fields, 1000) and bytes_left > 0 do
  looked = looked + 1
  local field = fields[looked]
  local message = call('HGET', inflight_key, field)
  if push('RPUSH', list_of(field), message) then
    bytes_left = bytes_left - #message
    local id = call('HGET', started_key, field)
    if id then
      -- Only what had started may have been the cause: it counts as an attempt.
      note_attempt(task_prefix .. id, tried_key, id, lost_attempt, {'attempts', 'crashes'}, task_ttl_s)
      if state_in(try('GET', meta_prefix .. id)) == 'STARTED' then
        try('DEL', meta_prefix .. id)
      end
      call('HDEL', started_key, field)
      log_event(id, claim_of(worker_id, field), 'queued', 'w', lost_attempt)
      started = started + 1
    end
    call('HDEL', inflight_key, field)
    moved = moved + 1
  end
end
if call('HLEN', inflight_key) == 0 then
  call('DEL', started_key)
  call('SREM', workers_key, worker_id)
end
return {moved, started, #fields - looked}
