-- due: return scheduled tasks whose time has come to the heads of their lists.
-- With: log
-- KEYS  1 scheduled   2 scheduled:messages
-- ARGV  1 channel to wake lanes   2 most tasks
-- Returns the number of tasks that were returned, or were none. The bytes of one call are bounded, but for one task's.
local scheduled_key, messages_key = KEYS[1], KEYS[2]
local wake_channel, tasks_max = ARGV[1], ARGV[2]
local ids = call('ZRANGE', scheduled_key, '-inf', now_text(), 'BYSCORE', 'LIMIT', 0, tasks_max)
if #ids == 0 then
  return 0
end
local refusal = denied({
  {'RPUSH', CELERY .. 'inference', ''}, {'ZREM', scheduled_key, 'member'}, {'HDEL', messages_key, 'field'}})
if refusal then
  return refusal
end
call('HLEN', messages_key)
begin_to_write(messages_key)
local done, count, bytes = 0, 0, 0
for n = 1, #ids do
  bytes = bytes + call('HSTRLEN', messages_key, ids[n])
  if n > 1 and bytes > CALL_BYTES then
    break
  end
  count = n
end
for n = count, 1, -1 do -- the earliest goes back last, so it stands at the head
  local value = call('HGET', messages_key, ids[n])
  local list, message = match(value or '', '^(%S+) (.*)$')
  local where = list and push('RPUSH', list, message)
  if where or not list then
    call('HDEL', messages_key, ids[n])
    call('ZREM', scheduled_key, ids[n])
    done = done + 1
  end
  if where then
    try('PUBLISH', wake_channel, where)
    log_event(ids[n], '', 'queued')
  end
end
return done
