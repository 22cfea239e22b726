-- settle: end claimed tasks, or this attempt of theirs; acknowledgement, result, event, next steps and dead letter, or
-- the time of the next attempt, in one step.
-- With: ended, attempts
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 dead   4 cancelled   5 scheduled   6 scheduled:messages
--       7 tried   8 ended   9 ended:before   10 ended:turn   11 cancelled:running
-- ARGV  1 prefix of result keys   2 lifetime of results in s   3 longest event stream   4 lifetime of streams in s
--       5 largest result that its event carries, if it is settled alone, so that who waits need not ask for it
--       6 prefix of letters   7 lifetime of letters in s   8 worker id   9 channel to wake lanes
--      10 prefix of task hashes   11 how long it is remembered that a task has ended, in s
--      12 MessagePack: array of [field, task id ("" where it cannot be read), state, result (JSON, "" for a result
--         that is to be ignored), stream ("" for none)], and for those that have any of it, as sixth, [claim checks
--         to delete, pushes [[list, message], …], other tasks that end with this one [[task id, state, result,
--         stream], …], [] or letter [letter id, model, reason, error, attempts, the last of them (JSON)], [] or, of a
--         task that is retried, [delay in s, this attempt (JSON)]]
-- Returns for each task 1; 0 where the claim was lost; 2 where the task was cancelled meanwhile: it stays claimed, and
-- is to be settled as cancelled, with what that owes to others; 3 where what it owes cannot be pushed (no right, or
-- other keys lie there). With 0, 2 and 3 nothing of it is written. Of a task that has ended already the message is
-- dropped and nothing else, but for the steps that a cancelled task owes, once however many messages it has: an end is
-- written once a run. A message that was sent anew after its task has failed ends the task's next run. Events carry the
-- number of a run that is not the first.
local tasks = cmsgpack.unpack(ARGV[12])
local fields, metas, ids = {}, {}, {}
local some_buried, some_retried = false, false
for n = 1, #tasks do
  local task = tasks[n]
  fields[n], ids[n], metas[n] = task[1], task[2], ARGV[1] .. task[2]
  some_buried = some_buried or (task[6] and #task[6][4] > 0)
  some_retried = some_retried or (task[6] and #task[6][5] > 0)
end
local first = ARGV[1] .. ids[1]
if not (may('SETEX', first, 1, '') and may('HDEL', KEYS[1], 'field') and may('HDEL', KEYS[2], 'field')) then
  return denied({{'SETEX', first, 1, ''}, {'HDEL', KEYS[1], 'field'}, {'HDEL', KEYS[2], 'field'}})
end
if some_buried or some_retried then
  local refusal = denied({
    {'HSET', ARGV[6] .. 'id', 'field', ''}, {'ZADD', KEYS[3], 0, 'member'}, {'DEL', first}, {'SET', first, ''},
    {'HSET', KEYS[6], 'field', ''}, {'ZADD', KEYS[5], 0, 'member'}})
  if refusal then
    return refusal
  end
  call('ZCARD', KEYS[3]) -- these fail before the first write if a key is of another type
  call('ZCARD', KEYS[5])
  call('HLEN', KEYS[6])
end
call('HLEN', KEYS[2])
local some_tried = call('TYPE', KEYS[7]).ok == 'set'
local some_cancelled = call('TYPE', KEYS[4]).ok == 'zset'
local function seconds()
  local time = call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

-- How tasks have ended, by id: Celery's state, and what is remembered of it.
local states, values = {}, {}
local function find_ends(wanted)
  local old, asked = call('MGET', unpack(wanted.metas)), {}
  for n, id in ipairs(wanted.ids) do
    local state = state_in(old[n])
    if state == 'SUCCESS' or state == 'FAILURE' or state == 'REVOKED' then
      states[id] = state
    end
    if not state or states[id] then
      asked[#asked + 1] = id
    end
  end
  for n, value in pairs(recall(KEYS[8], KEYS[9], asked)) do
    values[asked[n]] = value
    states[asked[n]] = states[asked[n]] or STATES[string.sub(value, 1, 1)]
  end
end
find_ends({ids = ids, metas = metas})
states[''] = nil

local ends = {} -- to be remembered: id, value, id, value, …
local events, single_events = {}, {}
local function end_task(id, state, meta, stream, run, failed)
  local key = ARGV[1] .. id
  local value = LETTERS[state] .. (run and run > 1 and run or '') .. (failed and ' ' .. failed or '')
  states[id], values[id] = STATES[LETTERS[state]], value
  ends[#ends + 1], ends[#ends + 2] = id, value
  if meta == '' then
    call('DEL', key)
  else
    call('SETEX', key, ARGV[2], meta)
    try('PUBLISH', key, meta)
  end
  stream = stream_for(id, stream)
  if stream == '' then
    return
  elseif run and run > 1 then
    single_events[#single_events + 1] = {stream, state, id, 'run', run}
  else
    events[stream] = events[stream] or {}
    events[stream][state] = events[stream][state] and events[stream][state] .. ' ' .. id or id
  end
end
-- The number of a task's run, the attempts of it that came to nothing, and what of it has failed before; they are
-- forgotten with its end.
local function close_run(id)
  if not (some_tried and id ~= '' and try('SREM', KEYS[7], id) == 1) then
    return nil, nil, nil
  end
  local found = try('HMGET', ARGV[10] .. id, 'run', 'history', 'failed')
  try('UNLINK', ARGV[10] .. id)
  return tonumber(found[1] or nil), found[2], found[3] or nil
end
local function pay(extra) -- what the end of a task owes to others; returns those that it has ended
  local ended = {}
  for _, step in ipairs(extra[2]) do
    local list = push('LPUSH', step[1], step[2])
    try('PUBLISH', ARGV[9], list or step[1])
  end
  for _, other in ipairs(extra[3]) do
    local id, state, meta, stream = other[1], other[2], other[3], other[4]
    find_ends({ids = {id}, metas = {ARGV[1] .. id}})
    if not states[id] then
      local run = close_run(id)
      end_task(id, state, meta, stream, run)
      ended[#ended + 1] = {id, stream, run or 1}
    end
  end
  return ended
end
local function bury(n, run, history, ended)
  local field, id, letter, now = fields[n], ids[n], tasks[n][6][4], seconds()
  local key = ARGV[6] .. letter[1]
  local message = call('HGET', KEYS[1], field)
  call('DEL', key) -- the letter of an earlier run
  call('HSET', key, 'message', message, 'queue', match(list_of(field), '^[^\6]*'),
    'list', list_of(field), 'task_id', id, 'model', letter[2],
    'reason', letter[3], 'error', letter[4], 'attempts', letter[5], 'worker', ARGV[8],
    'history', '[' .. (history and history .. ',' or '') .. letter[6] .. ']', 'run', run or 1, 'stream', tasks[n][5],
    'died_at', string.format('%.6f', now))
  if #ended > 0 then -- a redrive opens a run for these as well
    call('HSET', key, 'ended', cmsgpack.pack(ended))
  end
  call('EXPIRE', key, ARGV[7])
  call('ZADD', KEYS[3], now, letter[1])
  try('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - tonumber(ARGV[7]))
end
local function try_again(n)
  local task, id = tasks[n], ids[n]
  local retry = task[6][5]
  call('HSET', KEYS[6], id, list_of(fields[n]) .. ' ' .. call('HGET', KEYS[1], fields[n]))
  call('ZADD', KEYS[5], string.format('%.6f', seconds() + retry[1]), id)
  note_attempt(ARGV[10] .. id, KEYS[7], id, retry[2], {'attempts'}, ARGV[7])
  some_tried = true
  if task[4] == '' then
    call('DEL', metas[n])
  else
    call('SET', metas[n], task[4])
    try('PUBLISH', metas[n], task[4])
  end
  single_events[#single_events + 1] = {stream_for(id, task[5]), 'retrying', id}
end
-- Whether what a task owes can be pushed.
local function can_push(n)
  for _, step in ipairs(tasks[n][6] and tasks[n][6][2] or {}) do
    local list = CELERY .. step[1]
    local fits = type(try('LLEN', list)) == 'number' or type(try('LLEN', list .. ':returned')) == 'number'
    if not fits or denied({{'LPUSH', list, ''}}) then
      return false
    end
  end
  return true
end
-- The run that a message ends that was sent anew after its task has failed.
local function new_run(n)
  local id = ids[n]
  if states[id] == 'FAILURE' and not has_failed(call('HGET', KEYS[1], fields[n]), values[id], ARGV[6] .. id) then
    return run_in(values[id] or 'F' .. (try('HGET', ARGV[6] .. id, 'run') or '')) + 1
  end
end
-- Whether a message has failed in an earlier run than the one that is under way.
local function is_late_copy(n)
  local failed = some_tried and ids[n] ~= '' and try('HGET', ARGV[10] .. ids[n], 'failed')
  return type(failed) == 'string' and is_among(failed, call('HGET', KEYS[1], fields[n]))
end
-- Whether an end is yet to be paid for: that of a cancelled task, whose canvas nobody has read so far.
local function owes(id)
  return states[id] == 'REVOKED' and (not values[id] or string.sub(values[id], 1, 1) == 'c')
end

local function settle(n)
  local id, state, extra = ids[n], tasks[n][3], tasks[n][6]
  if call('HEXISTS', KEYS[1], fields[n]) == 0 then
    return 0
  end
  if not can_push(n) then
    return 3
  end
  if is_late_copy(n) then
    return 1
  end
  local mark = some_cancelled and id ~= '' and call('ZSCORE', KEYS[4], id)
  if mark and not states[id] and match(mark, '%.5$') then -- its end is not remembered any more, and was written
    states[id], values[id] = 'REVOKED', 'c'
  end
  local opened, earlier = new_run(n), nil
  if opened then
    states[id], earlier = nil, failed_in(values[id])
  end
  local is_cancelled = state == 'cancelled' or state == 'expired'
  if owes(id) and not is_cancelled then
    return 2
  end
  if state == 'retrying' then
    if mark and not states[id] then
      return 2
    end
    if opened then
      forget(KEYS[8], KEYS[9], id)
      open_run(ARGV[10] .. id, KEYS[7], id, opened, earlier, ARGV[7])
    end
    if not states[id] then
      try_again(n)
    end
    return 1
  end
  local is_fresh, is_owing = not states[id] and id ~= '', owes(id)
  local run, history, failed = close_run(id)
  run = opened or run
  if is_fresh then
    failed = state == 'failed' and with_failed(failed or earlier or '', call('HGET', KEYS[1], fields[n]))
    end_task(id, state, tasks[n][4], tasks[n][5], run, failed)
  end
  if mark then
    try('ZREM', KEYS[4], id)
    try('SREM', KEYS[11], id)
  end
  if not extra then
    return 1
  end
  if #extra[1] > 0 and states[id] ~= 'FAILURE' then -- a letter may be redriven, no other task runs again
    for _, blob in ipairs(extra[1]) do
      try('UNLINK', NAMESPACE .. blob)
    end
  end
  local ended = {}
  if is_fresh or is_owing or id == '' then
    ended = pay(extra)
  end
  if is_owing and #extra[2] + #extra[3] > 0 then
    ends[#ends + 1], ends[#ends + 2] = id, 'C' .. (values[id] and match(values[id], '^%a(%d+)') or '')
    values[id] = ends[#ends]
  end
  if #extra[4] > 0 and (is_fresh or id == '') then
    bury(n, run, history, ended)
  end
  return 1
end

begin_to_write(KEYS[1])
local reply, done = {}, {}
for n = 1, #tasks do
  reply[n] = settle(n)
  if reply[n] == 1 then
    done[#done + 1] = fields[n]
  end
end
remember(KEYS[8], KEYS[9], KEYS[10], tonumber(ARGV[11]), ends)
if #done > 0 then
  call('HDEL', KEYS[2], unpack(done))
  call('HDEL', KEYS[1], unpack(done))
end
local single = #tasks == 1 and tasks[1][4] ~= '' and #tasks[1][4] <= tonumber(ARGV[5]) and tasks[1][2]
for _, event in ipairs(single_events) do
  tell(event[1], ARGV[3], ARGV[4], unpack(event, 2))
end
for stream, states_of in pairs(events) do
  for state, list in pairs(states_of) do
    if list == single then
      tell(stream, ARGV[3], ARGV[4], state, list, 'result', tasks[1][4])
    else
      tell(stream, ARGV[3], ARGV[4], state, list)
    end
  end
end
return reply
