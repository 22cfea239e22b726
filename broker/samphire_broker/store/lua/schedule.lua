-- schedule: put claimed tasks aside until their time comes.
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 scheduled   4 scheduled:messages   5 cancelled
-- ARGV  1.. field, task id, time in s since 1970, field, task id, time, …
-- Returns for each task 1, 0 (claim lost), 2 (its time has come, by this clock: it stays claimed), 3 (another message
-- of the same id was scheduled, and is replaced), or -3 (it is cancelled: it stays claimed and is to be settled as such).
redis.call('ZCARD', KEYS[3]) -- these fail before the first write if a key is of another type
redis.call('HLEN', KEYS[4])
local some_cancelled = redis.call('TYPE', KEYS[5]).ok == 'zset'
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local reply = {}
for i = 1, #ARGV, 3 do
  local field, id, due = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local message = redis.call('HGET', KEYS[1], field)
  local verdict = message and 1 or 0
  if message and some_cancelled and redis.call('ZSCORE', KEYS[5], id) then
    verdict = -3
  elseif message and tonumber(due) <= now then
    verdict = 2
  elseif message then
    redis.call('HDEL', KEYS[1], field)
    redis.call('HDEL', KEYS[2], field)
    if redis.call('HSET', KEYS[4], id, string.match(field, '^%d+:(.*)$') .. ' ' .. message) == 0 then
      verdict = 3
    end
    redis.call('ZADD', KEYS[3], due, id)
  end
  reply[#reply + 1] = verdict
end
return reply
