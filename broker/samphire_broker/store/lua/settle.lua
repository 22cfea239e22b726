-- settle: end claimed tasks; acknowledgement, result, event, next steps and dead letter in one step.
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 dead   4 cancelled
-- ARGV  1 prefix of result keys   2 lifetime of results in s   3 longest event stream   4 lifetime of streams in s
--       5 largest result that its event carries, if it is settled alone, so that who waits need not ask for it
--       6 prefix of letters   7 lifetime of letters in s   8 worker id   9 channel to wake lanes
--      10 MessagePack: array of [field, task id ("" where it cannot be read), state, result (JSON, "" for a result
--         that is to be ignored), stream ("" for none), claim checks to delete, pushes [[list, message], …],
--         other tasks that end with this one [[task id, state, result, stream], …],
--         [] or letter [letter id, model, reason, error, attempts]]
-- Returns for each task 1, or 0 where the claim was lost: then nothing of it is written. Of a task that has ended
-- already the message is dropped and nothing else, but for its letter and the steps that a cancelled task owes: a
-- terminal state is written once.
-- HDEL, which needs no memory, is the first write, so the whole also goes through when memory is full.
local tasks = cmsgpack.unpack(ARGV[10])
local fields, metas, streams, lists, letters = {}, {}, {}, {}, {}
for n = 1, #tasks do
  local task = tasks[n]
  fields[n], metas[n] = task[1], ARGV[1] .. task[2]
  streams[task[5]] = {}
  for _, push in ipairs(task[7]) do
    lists[push[1]] = push[1]
  end
  for _, other in ipairs(task[8]) do
    streams[other[4]] = {}
  end
  if #task[9] > 0 then
    letters[n] = redis.call('HGET', KEYS[1], fields[n])
  end
end
-- Whatever could fail after the first write is looked at before it.
streams[''] = nil
for stream in pairs(streams) do
  local kind = redis.call('TYPE', stream).ok
  if kind ~= 'stream' and kind ~= 'none' then
    streams[stream] = nil
  end
end
for list in pairs(lists) do
  local kind = redis.call('TYPE', list).ok
  if kind ~= 'list' and kind ~= 'none' then -- a push to a key of another type would lose the message
    lists[list] = list .. ':returned'
  end
end
if next(letters) then
  redis.call('ZCARD', KEYS[3])
end
local some_cancelled = redis.call('TYPE', KEYS[4]).ok == 'zset'
local old = redis.call('MGET', unpack(metas))
local reply = {}
for n = 1, #fields do
  reply[n] = redis.call('HEXISTS', KEYS[1], fields[n])
end
redis.call('HDEL', KEYS[1], unpack(fields))
redis.call('HDEL', KEYS[2], unpack(fields))
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local terminal = {SUCCESS = true, FAILURE = true, REVOKED = true}
local ended = {}
local function has_ended(key, before)
  return ended[key] or (before and terminal[string.match(before, '"status": ?"(%u+)"')])
end
local function is_revoked(before)
  return before and string.match(before, '"status": ?"(%u+)"') == 'REVOKED'
end
local function finish(key, id, state, meta, stream)
  ended[key] = true
  if meta == '' then
    redis.call('DEL', key)
  else
    redis.call('SETEX', key, ARGV[2], meta)
    redis.call('PUBLISH', key, meta)
  end
  local events = streams[stream]
  if events then
    events[state] = events[state] and events[state] .. ' ' .. id or id
  end
end
for n = 1, #tasks do
  local field, id, state, meta, stream, blobs, pushes, others, letter = unpack(tasks[n])
  if reply[n] == 1 then
    local fresh = id ~= '' and not has_ended(metas[n], old[n])
    if fresh then
      finish(metas[n], id, state, meta, stream)
      if #blobs > 0 then
        redis.call('UNLINK', unpack(blobs))
      end
    end
    local marked = some_cancelled and id ~= '' and redis.call('ZREM', KEYS[4], id) == 1
    if fresh or id == '' or ((marked or state == 'cancelled') and is_revoked(old[n])) then
      for _, push in ipairs(pushes) do
        redis.call('LPUSH', lists[push[1]], push[2])
        redis.call('PUBLISH', ARGV[9], push[1])
      end
      for _, other in ipairs(others) do
        local key = ARGV[1] .. other[1]
        if not has_ended(key, redis.call('GET', key)) then
          finish(key, unpack(other))
        end
      end
    end
    if letters[n] then
      local key = ARGV[6] .. letter[1]
      redis.call('HSET', key, 'message', letters[n], 'queue', string.match(field, '^%d+:([^\6]*)'), 'task_id', id,
        'model', letter[2], 'reason', letter[3], 'error', letter[4], 'attempts', letter[5], 'worker', ARGV[8],
        'died_at', string.format('%.6f', now))
      redis.call('EXPIRE', key, ARGV[7])
      redis.call('ZADD', KEYS[3], now, letter[1])
    end
  end
end
if next(letters) then
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - tonumber(ARGV[7]))
end
for stream, events in pairs(streams) do
  for state, list in pairs(events) do
    if #tasks == 1 and list == tasks[1][2] and tasks[1][4] ~= '' and #tasks[1][4] <= tonumber(ARGV[5]) then
      redis.call('XADD', stream, 'MAXLEN', '~', ARGV[3], '*', state, list, 'result', tasks[1][4])
    else
      redis.call('XADD', stream, 'MAXLEN', '~', ARGV[3], '*', state, list)
    end
  end
  if next(events) then
    redis.call('EXPIRE', stream, ARGV[4])
  end
end
return reply
