-- settle: end claimed tasks, or this attempt of theirs; acknowledgement, result, event, next steps and dead letter, or
-- the time of the next attempt, in one step.
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 dead   4 cancelled   5 scheduled   6 scheduled:messages
--       7 tried   8 sub:queues
-- ARGV  1 prefix of result keys   2 lifetime of results in s   3 longest event stream   4 lifetime of streams in s
--       5 largest result that its event carries, if it is settled alone, so that who waits need not ask for it
--       6 prefix of letters   7 lifetime of letters in s   8 worker id   9 channel to wake lanes
--      10 prefix of task hashes
--      11 prefix of the notes that a cancelled task has paid what it owes
--      12 MessagePack: array of [field, task id ("" where it cannot be read), state, result (JSON, "" for a result
--         that is to be ignored), stream ("" for none)], and for those that have any of it, as sixth, [claim checks
--         to delete, pushes [[list, message], …], other tasks that end with this one [[task id, state, result,
--         stream], …], [] or letter [letter id, model, reason, error, attempts, the last of them (JSON)], [] or, of a
--         task that is retried, [delay in s, this attempt (JSON)]]
-- Returns for each task 1, or 0 where the claim was lost: then nothing of it is written. Of a task that has ended
-- already the message is dropped and nothing else, but for its letter and the steps that a cancelled task owes, once
-- however many messages it has: a terminal state is written once a run. Events of a redriven task carry the number of
-- its run.
-- HDEL, which needs no memory, is the first write, so the whole also goes through when memory is full.
local call, match = redis.call, string.match
local tasks = cmsgpack.unpack(ARGV[12])
local fields, metas, streams, lists, messages, some_retried = {}, {}, {}, {}, {}, false
for n = 1, #tasks do
  local task = tasks[n]
  fields[n], metas[n] = task[1], ARGV[1] .. task[2]
  if not streams[task[5]] then
    streams[task[5]] = {}
  end
  local extra = task[6]
  if extra then
    for _, push in ipairs(extra[2]) do
      lists[push[1]] = push[1]
    end
    for _, other in ipairs(extra[3]) do
      streams[other[4]] = streams[other[4]] or {}
    end
    if #extra[4] > 0 or #extra[5] > 0 then
      messages[n] = call('HGET', KEYS[1], fields[n])
      some_retried = some_retried or #extra[5] > 0
    end
  end
end
-- Whatever could fail after the first write is looked at before it.
streams[''] = nil
for stream in pairs(streams) do
  local kind = call('TYPE', stream).ok
  if kind ~= 'stream' and kind ~= 'none' then
    streams[stream] = nil
  end
end
for list in pairs(lists) do
  local kind = call('TYPE', list).ok
  if kind ~= 'list' and kind ~= 'none' then -- a push to a key of another type would lose the message
    lists[list] = list .. ':returned'
  end
end
if next(messages) then
  call('ZCARD', KEYS[3])
end
if some_retried then
  call('ZCARD', KEYS[5])
  call('HLEN', KEYS[6])
  call('SCARD', KEYS[7])
end
local some_tried = call('TYPE', KEYS[7]).ok == 'set'
local some_cancelled = call('TYPE', KEYS[4]).ok == 'zset'
local queues = call('TYPE', KEYS[8]).ok
local may_name_queues = queues == 'set' or queues == 'none'
local old = call('MGET', unpack(metas))
local reply = {}
for n = 1, #fields do
  reply[n] = call('HEXISTS', KEYS[1], fields[n])
end
call('HDEL', KEYS[1], unpack(fields))
call('HDEL', KEYS[2], unpack(fields))
local ends = {SUCCESS = 'ended', FAILURE = 'ended', REVOKED = 'revoked'}
local ended = {}
-- How the task of a stored result has ended: nil if it has not.
local function end_of(key, before)
  return ended[key] or (before and ends[match(before, '"status": ?"(%u+)"')])
end
local alone_events = {}
local function finish(key, id, state, meta, stream, run)
  ended[key] = 'ended'
  if meta == '' then
    call('DEL', key)
  else
    call('SETEX', key, ARGV[2], meta)
    call('PUBLISH', key, meta)
  end
  local events = streams[stream]
  if events and run then
    alone_events[#alone_events + 1] = {stream, state, id, run}
  elseif events then
    events[state] = events[state] and events[state] .. ' ' .. id or id
  end
end
local function pay(extra) -- what the end of a task owes to others
  for _, push in ipairs(extra[2]) do
    call('LPUSH', lists[push[1]], push[2])
    local queue = may_name_queues and match(push[1], '^[^\6]*')
    if queue and match(queue, '^inference%.') then -- a cancel looks for the next step where queues are known
      call('SADD', KEYS[8], queue)
    end
    call('PUBLISH', ARGV[9], push[1])
  end
  for _, other in ipairs(extra[3]) do
    local key = ARGV[1] .. other[1]
    if not end_of(key, call('GET', key)) then
      finish(key, other[1], other[2], other[3], other[4])
    end
  end
end
local function bury(field, id, stream, letter, message, run, history)
  local time = call('TIME')
  local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
  local key = ARGV[6] .. letter[1]
  call('HSET', key, 'message', message, 'queue', match(field, '^%d+:([^\6]*)'),
    'list', match(field, '^%d+:(.*)$'), 'task_id', id, 'model', letter[2],
    'reason', letter[3], 'error', letter[4], 'attempts', letter[5], 'worker', ARGV[8],
    'history', '[' .. (history and history .. ',' or '') .. letter[6] .. ']', 'run', run or 1, 'stream', stream,
    'died_at', string.format('%.6f', now))
  call('EXPIRE', key, ARGV[7])
  call('ZADD', KEYS[3], now, letter[1])
  call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - tonumber(ARGV[7]))
end
local function try_again(field, id, retry, message, now_is_fine)
  local hash, now = ARGV[10] .. id, call('TIME')
  local due = tonumber(now[1]) + tonumber(now[2]) / 1e6 + retry[1]
  call('HSET', KEYS[6], id, match(field, '^%d+:(.*)$') .. ' ' .. message)
  call('ZADD', KEYS[5], now_is_fine and 0 or string.format('%.6f', due), id)
  local history = call('HGET', hash, 'history')
  call('HSET', hash, 'history', history and history .. ',' .. retry[2] or retry[2])
  call('HINCRBY', hash, 'attempts', 1)
  call('EXPIRE', hash, ARGV[7])
  call('SADD', KEYS[7], id)
  call('EXPIRE', KEYS[7], ARGV[7])
  some_tried = true
end
local function attempt_over(n, task) -- of a task that is retried
  local id, key, stream = task[2], metas[n], task[5]
  local before = end_of(key, old[n])
  local cancelled = before == 'revoked' or (some_cancelled and call('ZSCORE', KEYS[4], id))
  if before == 'ended' then
    return
  end
  -- One that was cancelled meanwhile is claimed once more, at once, and ends as such.
  try_again(fields[n], id, task[6][5], messages[n], cancelled)
  if not before then
    if task[4] == '' then
      call('DEL', key)
    else
      call('SET', key, task[4])
      call('PUBLISH', key, task[4])
    end
    if streams[stream] then
      alone_events[#alone_events + 1] = {stream, 'retrying', id}
    end
  end
end
for n = 1, #tasks do
  if reply[n] == 1 and tasks[n][3] == 'retrying' then
    attempt_over(n, tasks[n])
  elseif reply[n] == 1 then
    local task = tasks[n]
    local id, key, extra = task[2], metas[n], task[6]
    local before = end_of(key, old[n])
    local fresh = not before and id ~= ''
    local run, history
    if some_tried and id ~= '' and call('SREM', KEYS[7], id) == 1 then
      local hash = ARGV[10] .. id
      local found = call('HMGET', hash, 'run', 'history')
      run, history = found[1], found[2]
      call('UNLINK', hash)
    end
    if fresh then
      finish(key, id, task[3], task[4], task[5], run)
    end
    local marked = some_cancelled and id ~= '' and call('ZREM', KEYS[4], id) == 1
    if extra then
      if fresh and #extra[1] > 0 then
        call('UNLINK', unpack(extra[1]))
      end
      local cancelled = (fresh and task[3] == 'cancelled') or (before == 'revoked' and (marked or task[3] == 'cancelled'))
      if #extra[2] + #extra[3] > 0 and (cancelled or fresh or id == '') then
        if not cancelled or call('SET', ARGV[11] .. id, '1', 'NX', 'EX', ARGV[2]) then
          pay(extra)
        end
      end
      if #extra[4] > 0 then
        bury(fields[n], id, task[5], extra[4], messages[n], run, history)
      end
    end
  end
end
local alone = #tasks == 1 and tasks[1][4] ~= '' and #tasks[1][4] <= tonumber(ARGV[5]) and tasks[1][2]
for _, event in ipairs(alone_events) do
  call('XADD', event[1], 'MAXLEN', '~', ARGV[3], '*', event[2], event[3], unpack(event[4] and {'run', event[4]} or {}))
  call('EXPIRE', event[1], ARGV[4])
end
for stream, events in pairs(streams) do
  for state, list in pairs(events) do
    if list == alone then
      call('XADD', stream, 'MAXLEN', '~', ARGV[3], '*', state, list, 'result', tasks[1][4])
    else
      call('XADD', stream, 'MAXLEN', '~', ARGV[3], '*', state, list)
    end
  end
  if next(events) then
    call('EXPIRE', stream, ARGV[4])
  end
end
return reply
