-- release: hand claimed messages back to the head of their lists, as if they had not been claimed.
-- With: attempts, log
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 tried
-- ARGV  1 prefix of result keys   2 prefix of task hashes   3 lifetime of task hashes in s
--       4 if what had started may be to blame, what to write of the attempt (JSON), else ""
--       5 "1" if the endpoint died with what had started   6 worker id   7.. fields, in the order of the claim
-- Returns the number of messages that were still ours.
local inflight_key, started_key, tried_key = KEYS[1], KEYS[2], KEYS[3]
local meta_prefix, task_prefix, task_ttl_s, blamed_attempt = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local endpoint_died, worker_id = ARGV[5], ARGV[6]
if #ARGV < 7 then
  return 0
end
local first_field = ARGV[7]
local refusal = denied({
  {'RPUSH', CELERY .. list_of(first_field), ''}, {'HDEL', inflight_key, 'field'}, {'HDEL', started_key, 'field'},
  {'DEL', meta_prefix .. 'id'}})
if refusal then
  return refusal
end
local counts = {}
if blamed_attempt ~= '' then
  counts = {'attempts', 'crashes', 'shared'}
end
if endpoint_died == '1' then
  counts[#counts + 1] = 'losses'
end
local moved = 0
call('HLEN', started_key)
begin_to_write(inflight_key)
for i = #ARGV, 7, -1 do -- the last claimed goes back first, so the order is kept
  local field = ARGV[i]
  local message = call('HGET', inflight_key, field)
  if message and push('RPUSH', list_of(field), message) then
    local id = call('HGET', started_key, field)
    if id then
      if #counts > 0 then
        note_attempt(task_prefix .. id, tried_key, id, blamed_attempt, counts, task_ttl_s)
      end
      if state_in(try('GET', meta_prefix .. id)) == 'STARTED' then
        try('DEL', meta_prefix .. id)
      end
      call('HDEL', started_key, field)
      log_event(id, claim_of(worker_id, field), 'queued')
    end
    call('HDEL', inflight_key, field)
    moved = moved + 1
  end
end
return moved
