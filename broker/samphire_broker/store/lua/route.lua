-- route: move claimed messages on to the queue that they belong to, without an attempt.
-- KEYS  1 worker:<wid>:inflight   2 sub:queues
-- ARGV  1 channel to wake lanes   2.. field, queue, list, field, queue, list, …
-- Returns the number of messages that were still ours.
local moved = 0
for i = 2, #ARGV, 3 do
  local field, queue, list = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local message = redis.call('HGET', KEYS[1], field)
  local kind = redis.call('TYPE', list).ok -- a push to a key of another type would lose the message
  if message and (kind == 'list' or kind == 'none') then
    redis.call('HDEL', KEYS[1], field)
    redis.call('SADD', KEYS[2], queue)
    if redis.call('LPUSH', list, message) == 1 then
      redis.call('PUBLISH', ARGV[1], queue)
    end
    moved = moved + 1
  end
end
return moved
