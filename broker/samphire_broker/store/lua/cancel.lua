-- cancel: end tasks, or mark them where somebody else has to.
-- KEYS  1 sub:cancels   2 cancelled   3 scheduled   4 scheduled:messages   5 cancelled:lately
--       6 worker:<wid>:started, of the worker that asks   7 sub:queues   8 workers
-- ARGV  1 prefix of result keys   2 lifetime of results in s   3 longest event stream   4 lifetime of streams in s
--       5 lifetime of marks in s   6 most marks   7 result (JSON with an empty task id)   8 channel to wake lanes
--       9 most requests that are taken from sub:cancels   10 prefix of the answers to requests that name no task
--      11 the intake   12 prefix of worker keys   13 prefix of letters   14.. ids that a revocation names
-- A request in the list is "<stream> <task id>", of a client that names a task of its own: the task ends now, and its
-- message is dropped when it is claimed. Where little is queued it is looked for first: an id that is nowhere is no
-- task, and nothing changes. A revocation goes to all workers of all applications, and may name anybody's
-- task: a scheduled one ends now, any other is marked, and ends if it is ever claimed. A running one is marked, and ends
-- where it runs: every worker that asks is told of the marked ones that it has started.
-- Returns task id, verdict, task id, verdict, …: "cancelled", "marked", the state of a task past cancelling or running
-- elsewhere, "unknown", and "running" for those that the worker that asks has started.
local requests = {}
if redis.call('TYPE', KEYS[1]).ok == 'list' then
  requests = redis.call('LRANGE', KEYS[1], 0, ARGV[9] - 1)
end
-- Whatever could fail after the first write is looked at before it.
local mark = redis.call('TYPE', KEYS[2]).ok
mark = mark == 'zset' or mark == 'none'
redis.call('ZCARD', KEYS[3])
redis.call('HLEN', KEYS[4])
redis.call('HLEN', KEYS[6])
if #requests > 0 then
  redis.call('LTRIM', KEYS[1], #requests, -1)
end
local time = redis.call('TIME')
local reply = {}
local looks, bytes = 4000, 16 * 2 ^ 20 -- what is searched in one call, for all ids together; beyond it an id is believed
local places, too_many
local function add_place(found)
  places[#places + 1] = found
  for _, message in ipairs(found) do
    bytes = bytes - #message
  end
  too_many = bytes < 0
end
local function find_places()
  places = {}
  local queues = redis.call('SMEMBERS', KEYS[7])
  queues[#queues + 1] = ARGV[11]
  for _, queue in ipairs(queues) do
    for _, suffix in ipairs({'', '\6\0223', '\6\0226', '\6\0229'}) do
      for first = 0, looks, 32 do -- a page at a time: a few large messages are not to fill the server's memory
        local found = redis.pcall('LRANGE', queue .. suffix, first, first + 31)
        if found.err or #found == 0 then
          break
        end
        add_place(found)
        if too_many then
          return
        end
      end
    end
  end
  for _, worker in ipairs(redis.call('SMEMBERS', KEYS[8])) do
    local found = redis.pcall('HVALS', ARGV[12] .. worker .. ':inflight')
    if not found.err then
      add_place(found)
      if too_many then
        return
      end
    end
  end
end
local function is_coded(message) -- Celery's own steps of a canvas: the ids of those to come cannot be seen in them
  return string.find(message, '"body_encoding": ?"base64"')
end
local function is_known(id)
  if redis.call('EXISTS', ARGV[13] .. id) == 1 then
    return true
  end
  if not places then
    find_places()
  end
  if too_many then
    return true
  end
  for _, messages in ipairs(places) do
    for _, message in ipairs(messages) do
      looks = looks - 1
      if looks <= 0 or string.find(message, id, 1, true) or is_coded(message) then
        return true
      end
    end
  end
  return false
end
local function cancel(id, stream, named)
  local key = ARGV[1] .. id
  local meta = redis.pcall('GET', key)
  local state = type(meta) == 'string' and string.match(meta, '"status": ?"(%u+)"')
  local value = redis.call('HGET', KEYS[4], id)
  local verdict = state
  if named and not state and not value and not is_known(id) then
    reply[#reply + 1] = id
    reply[#reply + 1] = 'unknown'
    redis.call('SETEX', ARGV[10] .. id, 10, '1')
    return
  end
  if mark and state == 'STARTED' then
    redis.call('ZADD', KEYS[2], time[1], id)
    redis.call('SET', KEYS[5], '1', 'EX', 60)
  end
  -- On a revocation any other worker of Celery's writes REVOKED too; the message is ours to drop all the same.
  local revoked = state == 'REVOKED'
  if revoked or not state or state == 'PENDING' or state == 'RETRY' then
    verdict = revoked and state or 'marked'
    if mark then
      redis.call('ZADD', KEYS[2], time[1], id)
      redis.call('SET', KEYS[5], '1', 'EX', 60)
    end
    if not revoked and (named or value) then
      verdict = 'cancelled'
      local result = string.gsub(ARGV[7], '"task_id":""', function() return '"task_id":' .. cjson.encode(id) end, 1)
      redis.call('SETEX', key, ARGV[2], result)
      redis.call('PUBLISH', key, result)
    end
    if value then -- what its message owes to others is settled by whoever claims it
      local list, message = string.match(value, '^(%S+) (.*)$')
      local kind = redis.call('TYPE', list).ok
      redis.call('ZREM', KEYS[3], id)
      redis.call('HDEL', KEYS[4], id)
      redis.call('RPUSH', (kind == 'list' or kind == 'none') and list or list .. ':returned', message)
      redis.call('PUBLISH', ARGV[8], list)
    end
    if not revoked and string.match(stream, '^events:[%w-]+$') then -- a client's stream, and no other key
      local kind = redis.call('TYPE', stream).ok
      if kind == 'stream' or kind == 'none' then
        redis.call('XADD', stream, 'MAXLEN', '~', ARGV[3], '*', 'cancelled', id)
        redis.call('EXPIRE', stream, ARGV[4])
      end
    end
  end
  reply[#reply + 1] = id
  reply[#reply + 1] = verdict
end
for n = 1, #requests do
  local stream, id = string.match(requests[n], '^(%S*) (.+)$')
  if id then
    cancel(id, stream, true)
  end
end
for i = 14, #ARGV do
  cancel(ARGV[i], '', false)
end
if mark and #reply > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', time[1] - ARGV[5])
  redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -ARGV[6] - 1)
end
if mark and redis.call('EXISTS', KEYS[5]) == 1 then
  local started = redis.call('HVALS', KEYS[6])
  for first = 1, #started, 1000 do -- unpack takes at most 7,999 values
    local last = math.min(first + 999, #started)
    local marks = redis.call('ZMSCORE', KEYS[2], unpack(started, first, last))
    for n = first, last do
      if marks[n - first + 1] then
        reply[#reply + 1] = started[n]
        reply[#reply + 1] = 'running'
      end
    end
  end
end
return reply
