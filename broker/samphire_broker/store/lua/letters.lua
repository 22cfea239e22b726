-- letters: redrive and purge dead letters, as clients ask for.
-- KEYS  1 sub:letters   2 dead   3 tried
-- ARGV  1 prefix of letters   2 prefix of result keys   3 prefix of task hashes   4 channel to wake lanes
--       5 most requests   6 longest event stream   7 lifetime of streams in s   8 lifetime of task hashes in s
-- A request is "redrive <letter id>" or "purge <letter id>". A redriven message returns to its list as it was sent; the
-- task's failure and its attempts are forgotten: its next run begins. Returns the number of requests.
if redis.call('TYPE', KEYS[1]).ok ~= 'list' then
  return 0
end
redis.call('ZCARD', KEYS[2]) -- these fail before the first write if a key is of another type
redis.call('SCARD', KEYS[3])
local requests = redis.call('LRANGE', KEYS[1], 0, ARGV[5] - 1)
redis.call('LTRIM', KEYS[1], #requests, -1)
for n = 1, #requests do
  local verb, letter = string.match(requests[n], '^(%l+) (.+)$')
  local key = ARGV[1] .. (letter or '')
  if letter and redis.call('TYPE', key).ok == 'hash' then
    local found = redis.call('HMGET', key, 'message', 'list', 'task_id', 'run', 'stream')
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
        if id ~= '' then
          local run = tonumber(found[4] or 1) + 1
          redis.call('HSET', ARGV[3] .. id, 'run', run)
          redis.call('EXPIRE', ARGV[3] .. id, ARGV[8])
          redis.call('SADD', KEYS[3], id)
          redis.call('EXPIRE', KEYS[3], ARGV[8])
          local stream = found[5]
          local kind_of_stream = stream and stream ~= '' and redis.call('TYPE', stream).ok
          if kind_of_stream == 'stream' or kind_of_stream == 'none' then
            redis.call('XADD', stream, 'MAXLEN', '~', ARGV[6], '*', 'redriven', id, 'run', run)
            redis.call('EXPIRE', stream, ARGV[7])
          end
        end
        redis.call('LPUSH', list, message)
        redis.call('PUBLISH', ARGV[4], list)
      end
    end
  end
end
return #requests
