-- release: hand claimed messages back to the head of their lists, as if they had not been claimed.
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 suspects
-- ARGV  1 prefix of result keys   2 prefix of task hashes   3 lifetime of task hashes in s
--       4 "1" if what had started may be to blame: it counts as an attempt   5.. fields, in the order of the claim
-- Returns the number of messages that were still ours.
local moved = 0
for i = #ARGV, 5, -1 do -- the last claimed goes back first, so the order is kept
  local field = ARGV[i]
  local message = redis.call('HGET', KEYS[1], field)
  local list = string.match(field, '^%d+:(.*)$')
  local kind = redis.call('TYPE', list).ok -- a push to a key of another type would lose the message
  if message and (kind == 'list' or kind == 'none') then
    local id = redis.call('HGET', KEYS[2], field)
    redis.call('HDEL', KEYS[1], field)
    redis.call('RPUSH', list, message)
    if id then
      redis.call('HDEL', KEYS[2], field)
      if ARGV[4] == '1' then
        redis.call('HINCRBY', ARGV[2] .. id, 'attempts', 1)
        redis.call('EXPIRE', ARGV[2] .. id, ARGV[3])
        redis.call('SET', KEYS[3], '1', 'EX', ARGV[3])
      end
      local meta = redis.call('GET', ARGV[1] .. id)
      if meta and string.match(meta, '"status": ?"(%u+)"') == 'STARTED' then
        redis.call('DEL', ARGV[1] .. id)
      end
    end
    moved = moved + 1
  end
end
return moved
