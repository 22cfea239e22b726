-- route: move claimed messages on to the queue that they belong to, without an attempt.
-- KEYS  1 worker:<wid>:inflight
-- ARGV  1 channel to wake lanes   2.. field, queue, list, field, queue, list, …
-- Returns the number of messages that were still ours.
local inflight_key = KEYS[1]
local wake_channel = ARGV[1]
local first_list = ARGV[4]
local refusal = denied({{'LPUSH', CELERY .. first_list, ''}, {'HDEL', inflight_key, 'field'}})
if refusal then
  return refusal
end
begin_to_write(inflight_key)
local moved = 0
for i = 2, #ARGV, 3 do
  local field, queue, list = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local message = call('HGET', inflight_key, field)
  if message then
    local where = push('LPUSH', list, message)
    if where then
      call('HDEL', inflight_key, field)
      if try('LLEN', CELERY .. where) == 1 then
        try('PUBLISH', wake_channel, queue)
      end
      moved = moved + 1
    end
  end
end
return moved
