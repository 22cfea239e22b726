-- release: hand claimed messages back to the head of their lists, as if they had not been claimed.
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 tried
-- ARGV  1 prefix of result keys   2 prefix of task hashes   3 lifetime of task hashes in s
--       4 if what had started may be to blame, what to write of the attempt (JSON), else ""
--       5 "1" if the endpoint died with what had started   6.. fields, in the order of the claim
-- Returns the number of messages that were still ours.
local moved = 0
redis.call('SCARD', KEYS[3]) -- fails before the first write if the key is of another type
for i = #ARGV, 6, -1 do -- the last claimed goes back first, so the order is kept
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
      if ARGV[4] ~= '' or ARGV[5] == '1' then
        local hash = ARGV[2] .. id
        if ARGV[4] ~= '' then
          local history = redis.call('HGET', hash, 'history')
          redis.call('HSET', hash, 'history', history and history .. ',' .. ARGV[4] or ARGV[4])
          redis.call('HINCRBY', hash, 'attempts', 1)
          redis.call('HINCRBY', hash, 'crashes', 1)
          redis.call('HINCRBY', hash, 'shared', 1)
        end
        if ARGV[5] == '1' then
          redis.call('HINCRBY', hash, 'losses', 1)
        end
        redis.call('EXPIRE', hash, ARGV[3])
        redis.call('SADD', KEYS[3], id)
        redis.call('EXPIRE', KEYS[3], ARGV[3])
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
