-- due: return scheduled tasks whose time has come to the heads of their lists.
-- KEYS  1 scheduled   2 scheduled:messages
-- ARGV  1 channel to wake lanes   2 most tasks
-- Returns the number of tasks that were returned.
local time = redis.call('TIME')
local ids = redis.call('ZRANGE', KEYS[1], '-inf', time[1] .. '.' .. string.format('%06d', time[2]), 'BYSCORE', 'LIMIT', 0,
  ARGV[2])
for n = #ids, 1, -1 do -- the earliest goes back last, so it stands at the head
  local value = redis.call('HGET', KEYS[2], ids[n])
  redis.call('ZREM', KEYS[1], ids[n])
  if value then
    local list, message = string.match(value, '^(%S+) (.*)$')
    local kind = redis.call('TYPE', list).ok
    if kind ~= 'list' and kind ~= 'none' then -- a push to a key of another type would lose the message
      list = list .. ':returned'
    end
    redis.call('HDEL', KEYS[2], ids[n])
    redis.call('RPUSH', list, message)
    redis.call('PUBLISH', ARGV[1], list)
  end
end
return #ids
