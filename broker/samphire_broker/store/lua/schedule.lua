-- schedule: put claimed tasks aside until their time comes.
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 scheduled   4 scheduled:messages
-- ARGV  1.. field, task id, time in s since 1970, field, task id, time, …
-- Returns the number of messages that were still ours. A task of the same id that is scheduled already is replaced.
redis.call('ZCARD', KEYS[3]) -- these fail before the first write if a key is of another type
redis.call('HLEN', KEYS[4])
local moved = 0
for i = 1, #ARGV, 3 do
  local field, id, due = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local message = redis.call('HGET', KEYS[1], field)
  if message then
    redis.call('HDEL', KEYS[1], field)
    redis.call('HDEL', KEYS[2], field)
    redis.call('HSET', KEYS[4], id, string.match(field, '^%d+:(.*)$') .. ' ' .. message)
    redis.call('ZADD', KEYS[3], due, id)
    moved = moved + 1
  end
end
return moved
