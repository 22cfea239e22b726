-- letters: redrive and purge dead letters, as clients ask for.
-- KEYS  1 sub:letters   2 dead
-- ARGV  1 prefix of letters   2 prefix of result keys   3 prefix of task hashes   4 channel to wake lanes
--       5 most requests
-- A request is "redrive <letter id>" or "purge <letter id>". A redriven message returns to its list as it was sent; the
-- task's failure and its attempts are forgotten: a new run begins. Returns the number of requests.
if redis.call('TYPE', KEYS[1]).ok ~= 'list' then
  return 0
end
redis.call('ZCARD', KEYS[2]) -- fails before the first write if the key is of another type
local requests = redis.call('LRANGE', KEYS[1], 0, ARGV[5] - 1)
redis.call('LTRIM', KEYS[1], #requests, -1)
for n = 1, #requests do
  local verb, letter = string.match(requests[n], '^(%l+) (.+)$')
  local key = ARGV[1] .. (letter or '')
  if letter and redis.call('TYPE', key).ok == 'hash' then
    local found = redis.call('HMGET', key, 'message', 'list', 'task_id')
    local message, list, id = found[1], found[2], found[3]
    if verb == 'purge' then
      redis.call('DEL', key)
      redis.call('ZREM', KEYS[2], letter)
    elseif verb == 'redrive' and message and list then
      local kind = redis.call('TYPE', list).ok
      if kind == 'list' or kind == 'none' then -- else the letter stays
        redis.call('DEL', key, ARGV[3] .. id)
        redis.call('ZREM', KEYS[2], letter)
        local meta = redis.pcall('GET', ARGV[2] .. id)
        if type(meta) == 'string' and string.match(meta, '"status": ?"(%u+)"') == 'FAILURE' then
          redis.call('DEL', ARGV[2] .. id)
        end
        redis.call('LPUSH', list, message)
        redis.call('PUBLISH', ARGV[4], list)
      end
    end
  end
end
return #requests
