-- reap: return a lost worker's messages to the heads of their lists.
-- KEYS  1 worker:<wid>   2 worker:<wid>:info   3 worker:<wid>:inflight   4 worker:<wid>:started   5 workers
--       6 tried   7 alone
-- ARGV  1 wid   2 value of the lease's counter when its connection was last missed ("" if only a lapsed lease
--       counts)   3 prefix of result keys   4 prefix of task hashes   5 lifetime of task hashes in s
--       6 what to write of the attempts that were lost (JSON)
-- A lease that has beaten since then belongs to a worker that lives: nothing happens.
-- Returns {messages returned, of them started, messages left for the next call}; {-1, 0, 0} if it lives.
local beat = redis.call('GET', KEYS[1])
if beat and beat ~= ARGV[2] then
  return {-1, 0, 0}
end
redis.call('DEL', KEYS[1], KEYS[2])
local alone = redis.pcall('GET', KEYS[7])
if type(alone) == 'string' and string.sub(alone, 1, #ARGV[1] + 1) == ARGV[1] .. ' ' then
  redis.call('DEL', KEYS[7])
end
redis.call('SCARD', KEYS[6]) -- fails before a message is moved if the key is of another type
local moved, started = 0, 0
local fields = redis.call('HKEYS', KEYS[3])
local function number(field)
  return tonumber(string.match(field, '^%d+'))
end
-- The last claimed goes back first, so the order is kept.
table.sort(fields, function(a, b) return number(a) > number(b) end)
for i = 1, math.min(#fields, 1000) do
  local field = fields[i]
  local id = redis.call('HGET', KEYS[4], field)
  local message = redis.call('HGET', KEYS[3], field)
  local list = string.match(field, '^%d+:(.*)$')
  local kind = redis.call('TYPE', list).ok
  if kind ~= 'list' and kind ~= 'none' then -- a push to a key of another type would lose the message
    list = list .. ':returned'
  end
  redis.call('HDEL', KEYS[3], field)
  redis.call('RPUSH', list, message)
  if id then
    -- Only what had started may have been the cause: it counts as an attempt.
    local key = ARGV[4] .. id
    redis.call('HDEL', KEYS[4], field)
    local history = redis.call('HGET', key, 'history')
    redis.call('HSET', key, 'history', history and history .. ',' .. ARGV[6] or ARGV[6])
    redis.call('HINCRBY', key, 'attempts', 1)
    redis.call('HINCRBY', key, 'crashes', 1)
    redis.call('EXPIRE', key, ARGV[5])
    redis.call('SADD', KEYS[6], id)
    redis.call('EXPIRE', KEYS[6], ARGV[5])
    local meta = redis.call('GET', ARGV[3] .. id)
    if meta and string.match(meta, '"status": ?"(%u+)"') == 'STARTED' then
      redis.call('DEL', ARGV[3] .. id)
    end
    started = started + 1
  end
  moved = moved + 1
end
local left = redis.call('HLEN', KEYS[3])
if left == 0 then
  redis.call('DEL', KEYS[4])
  redis.call('SREM', KEYS[5], ARGV[1])
end
return {moved, started, left}
