-- trim: delete the oldest dead letters beyond a number, and forget the names of those whose time is over.
-- KEYS  1 dead
-- ARGV  1 prefix of letters   2 most letters   3 lifetime of letters in s
-- At most 1,000 a call. Returns {letters deleted, letters left, time of death of the oldest that is left, this time},
-- the times in s since 1970 ("" where there is none).
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', redis.call('TIME')[1] - ARGV[3])
local over = math.min(redis.call('ZCARD', KEYS[1]) - tonumber(ARGV[2]), 1000)
if over > 0 then
  local letters = redis.call('ZRANGE', KEYS[1], 0, over - 1)
  for n = 1, #letters do
    redis.call('UNLINK', ARGV[1] .. letters[n])
  end
  redis.call('ZREM', KEYS[1], unpack(letters))
end
local oldest = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
return {math.max(over, 0), redis.call('ZCARD', KEYS[1]), oldest[2] or '', redis.call('TIME')[1]}
