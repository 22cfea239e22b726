-- route: move claimed messages on to the queue that they belong to, without an attempt.
-- KEYS  1 worker:<wid>:inflight
-- ARGV  1 channel to wake lanes   2.. field, queue, list, field, queue, list, …
-- Returns the number of messages that were still ours.
local refusal = denied({{'LPUSH', CELERY .. ARGV[4], ''}, {'HDEL', KEYS[1], 'field'}})
if refusal then
  return refusal
end
begin_to_write(KEYS[1])
local moved = 0
for i = 2, #ARGV, 3 do
  local field, queue, list = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local message = call('HGET', KEYS[1], field)
  if message then
    local where = push('LPUSH', list, message)
    if where then
      call('HDEL', KEYS[1], field)
      if try('LLEN', CELERY .. where) == 1 then
        try('PUBLISH', ARGV[1], queue)
      end
      moved = moved + 1
    end
  end
end
return moved
