-- release: hand claimed messages back to the head of their lists, as if they had not been claimed.
-- With: attempts
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 tried
-- ARGV  1 prefix of result keys   2 prefix of task hashes   3 lifetime of task hashes in s
--       4 if what had started may be to blame, what to write of the attempt (JSON), else ""
--       5 "1" if the endpoint died with what had started   6.. fields, in the order of the claim
-- Returns the number of messages that were still ours.
if #ARGV < 6 then
  return 0
end
local refusal = denied({
  {'RPUSH', CELERY .. list_of(ARGV[6]), ''}, {'HDEL', KEYS[1], 'field'}, {'HDEL', KEYS[2], 'field'},
  {'DEL', ARGV[1] .. 'id'}})
if refusal then
  return refusal
end
local counts = {}
if ARGV[4] ~= '' then
  counts = {'attempts', 'crashes', 'shared'}
end
if ARGV[5] == '1' then
  counts[#counts + 1] = 'losses'
end
local moved = 0
call('HLEN', KEYS[2])
begin_to_write(KEYS[1])
for i = #ARGV, 6, -1 do -- the last claimed goes back first, so the order is kept
  local field = ARGV[i]
  local message = call('HGET', KEYS[1], field)
  if message and push('RPUSH', list_of(field), message) then
    local id = call('HGET', KEYS[2], field)
    if id then
      if #counts > 0 then
        note_attempt(ARGV[2] .. id, KEYS[3], id, ARGV[4], counts, ARGV[3])
      end
      if state_in(try('GET', ARGV[1] .. id)) == 'STARTED' then
        try('DEL', ARGV[1] .. id)
      end
      call('HDEL', KEYS[2], field)
    end
    call('HDEL', KEYS[1], field)
    moved = moved + 1
  end
end
return moved
