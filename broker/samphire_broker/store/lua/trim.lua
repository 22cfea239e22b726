-- trim: delete the oldest dead letters beyond a number, and forget the names of those whose time is over.
-- KEYS  1 dead
-- ARGV  1 prefix of letters   2 most letters   3 lifetime of letters in s
-- At most 1,000 a call. Returns {letters deleted, letters left, time of death of the oldest that is left, this time},
-- the times in s since 1970 ("" where there is none).
local refusal = denied({{'ZREM', KEYS[1], 'member'}, {'ZREMRANGEBYSCORE', KEYS[1], 0, 0}, {'UNLINK', ARGV[1] .. 'id'}})
if refusal then
  return refusal
end
call('ZREMRANGEBYSCORE', KEYS[1], '-inf', call('TIME')[1] - ARGV[3])
local over = math.min(call('ZCARD', KEYS[1]) - tonumber(ARGV[2]), 1000)
if over > 0 then
  local letters = call('ZRANGE', KEYS[1], 0, over - 1)
  for n = 1, #letters do
    call('UNLINK', ARGV[1] .. letters[n])
  end
  call('ZREM', KEYS[1], unpack(letters))
end
local oldest = call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
return {math.max(over, 0), call('ZCARD', KEYS[1]), oldest[2] or '', call('TIME')[1]}
