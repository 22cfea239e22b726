-- cancel: end tasks that have not started.
-- KEYS  1 sub:cancels   2 cancelled   3 scheduled   4 scheduled:messages
-- ARGV  1 prefix of result keys   2 lifetime of results in s   3 longest event stream   4 lifetime of streams in s
--       5 lifetime of marks in s   6 result (JSON with an empty task id)   7 channel to wake lanes
--       8 most requests that are taken from sub:cancels   9.. more requests
-- A request is "<stream> <task id>"; the stream may be empty.
-- A queued task is marked, and its message is dropped when it is claimed; a scheduled one returns to its queue now.
-- Returns task id, verdict, task id, verdict, …: "cancelled", or the state of a task that is past cancelling.
local kind = redis.call('TYPE', KEYS[1]).ok
local requests = {}
if kind == 'list' and tonumber(ARGV[8]) > 0 then
  requests = redis.call('LRANGE', KEYS[1], 0, ARGV[8] - 1)
end
local taken = #requests
for i = 9, #ARGV do
  requests[#requests + 1] = ARGV[i]
end
redis.call('SCARD', KEYS[2]) -- these fail before the first write if a key is of another type
redis.call('ZCARD', KEYS[3])
redis.call('HLEN', KEYS[4])
if taken > 0 then
  redis.call('LTRIM', KEYS[1], taken, -1)
end
local reply = {}
for n = 1, #requests do
  local stream, id = string.match(requests[n], '^(%S*) (.+)$')
  if id then
    local key = ARGV[1] .. id
    local meta = redis.call('GET', key)
    local state = meta and string.match(meta, '"status": ?"(%u+)"')
    local verdict = state
    if not meta or state == 'PENDING' or state == 'RETRY' then
      verdict = 'cancelled'
      redis.call('SADD', KEYS[2], id)
      redis.call('EXPIRE', KEYS[2], ARGV[5])
      local result = string.gsub(ARGV[6], '"task_id":""', function() return '"task_id":' .. cjson.encode(id) end, 1)
      redis.call('SETEX', key, ARGV[2], result)
      redis.call('PUBLISH', key, result)
      local value = redis.call('HGET', KEYS[4], id)
      if value then -- what its message owes to others is settled by whoever claims it
        local list, message = string.match(value, '^(%S+) (.*)$')
        local of = redis.call('TYPE', list).ok
        redis.call('ZREM', KEYS[3], id)
        redis.call('HDEL', KEYS[4], id)
        redis.call('RPUSH', (of == 'list' or of == 'none') and list or list .. ':returned', message)
        redis.call('PUBLISH', ARGV[7], list)
      end
      if stream ~= '' then
        local type_of = redis.call('TYPE', stream).ok
        if type_of == 'stream' or type_of == 'none' then
          redis.call('XADD', stream, 'MAXLEN', '~', ARGV[3], '*', 'cancelled', id)
          redis.call('EXPIRE', stream, ARGV[4])
        end
      end
    end
    reply[#reply + 1] = id
    reply[#reply + 1] = verdict or 'unknown'
  end
end
return reply
