-- due: return scheduled tasks whose time has come to the heads of their lists.
-- KEYS  1 scheduled   2 scheduled:messages
-- ARGV  1 channel to wake lanes   2 most tasks
-- Returns the number of tasks that were returned, or were none. The bytes of one call are bounded, but for one task's.
local time = call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
local ids = call('ZRANGE', KEYS[1], '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[2])
if #ids == 0 then
  return 0
end
local refusal = denied({{'RPUSH', CELERY .. 'inference', ''}, {'ZREM', KEYS[1], 'member'}, {'HDEL', KEYS[2], 'field'}})
if refusal then
  return refusal
end
call('HLEN', KEYS[2])
begin_to_write(KEYS[2])
local done, count, bytes = 0, 0, 0
for n = 1, #ids do
  bytes = bytes + call('HSTRLEN', KEYS[2], ids[n])
  if n > 1 and bytes > CALL_BYTES then
    break
  end
  count = n
end
for n = count, 1, -1 do -- the earliest goes back last, so it stands at the head
  local value = call('HGET', KEYS[2], ids[n])
  local list, message = match(value or '', '^(%S+) (.*)$')
  local where = list and push('RPUSH', list, message)
  if where or not list then
    call('HDEL', KEYS[2], ids[n])
    call('ZREM', KEYS[1], ids[n])
    done = done + 1
  end
  if where then
    try('PUBLISH', ARGV[1], where)
  end
end
return done
