-- trim: delete the oldest dead letters beyond a number, and forget the names of those whose time is over.
-- KEYS  1 dead
-- ARGV  1 prefix of letters   2 most letters   3 lifetime of letters in s
-- At most 1,000 a call. Returns {letters deleted, letters left, time of death of the oldest that is left, this time},
-- the times in s since 1970 ("" where there is none).
local dead_key = KEYS[1]
local letter_prefix, letters_max, letter_ttl_s = ARGV[1], ARGV[2], ARGV[3]
local refusal = denied({
  {'ZREM', dead_key, 'member'}, {'ZREMRANGEBYSCORE', dead_key, 0, 0}, {'UNLINK', letter_prefix .. 'id'}})
if refusal then
  return refusal
end
call('ZREMRANGEBYSCORE', dead_key, '-inf', call('TIME')[1] - letter_ttl_s)
local over = math.min(call('ZCARD', dead_key) - tonumber(letters_max), 1000)
if over > 0 then
  local letters = call('ZRANGE', dead_key, 0, over - 1)
  for n = 1, #letters do
    call('UNLINK', letter_prefix .. letters[n])
  end
  call('ZREM', dead_key, unpack(letters))
end
local oldest = call('ZRANGE', dead_key, 0, 0, 'WITHSCORES')
return {math.max(over, 0), call('ZCARD', dead_key), oldest[2] or '', call('TIME')[1]}
