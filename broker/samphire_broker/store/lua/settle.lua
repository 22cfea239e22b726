-- settle: end claimed tasks, or this attempt of theirs; acknowledgement, result, event, next steps and dead letter, or
-- the time of the next attempt, in one step.
-- With: ended, attempts, log, outbox
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 dead   4 cancelled   5 scheduled   6 scheduled:messages
--       7 tried   8 ended   9 ended:before   10 ended:turn   11 cancelled:running
-- ARGV  1 prefix of result keys   2 lifetime of results in s   3 longest event stream   4 lifetime of streams in s
--       5 largest result that its event carries, if it is settled alone, so that who waits need not ask for it
--       6 prefix of letters   7 lifetime of letters in s   8 worker id   9 channel to wake lanes
--      10 prefix of task hashes   11 how long it is remembered that a task has ended, in s
--      12 MessagePack: array of [field, task id ("" where it cannot be read), state, result (JSON, "" for a result
--         that is to be ignored), stream ("" for none)], and for those that have any of it, as sixth, [claim checks
--         to delete, pushes [[list, message], …], other tasks that end with this one [[task id, state, result,
--         stream, webhooks], …], [] or letter [letter id, model, reason, error, attempts, the last of them (JSON)], [] or, of a
--         task that is retried, [delay in s, this attempt (JSON)], [] or, of one that has streamed, [its outputs], webhooks
--         to put out [entry, …] (`shared/outbox.lua`), [] or, of a delivery, [its id, endpoint, task in whose order it
--         goes, state, this attempt (JSON), how many are kept, for how long in s, 1 if it was sent again by hand]]
-- Returns for each task 1; 0 where the claim was lost; 2 where the task was cancelled meanwhile: it stays claimed, and
-- is to be settled as cancelled, with what that owes to others; 3 where its next steps cannot be pushed (no right,
-- or other keys lie there), 5 where webhooks cannot; 4 where the log lacks some of the outputs that it has given
-- out, since the broker has lost them.
-- With 0, 2, 3, 4 and 5 nothing of it is written. Of a task that has ended already the message is
-- dropped and nothing else, but for the steps that a cancelled task owes, once however many messages it has: an end is
-- written once a run. A message that was sent anew after its task has failed ends the task's next run. Events carry the
-- number of a run that is not the first.
local inflight_key, started_key, dead_key, cancelled_key, scheduled_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local messages_key, tried_key, ended_key, ended_before_key = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local ended_turn_key, running_key = KEYS[10], KEYS[11]
local meta_prefix, result_ttl_s, stream_max, stream_ttl_s, inline_max = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local letter_prefix, letter_ttl_s, worker_id, wake_channel, task_prefix = ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local remember_s, packed = ARGV[11], ARGV[12]
local tried_deliveries_key = NAMESPACE .. 'webhook:tried' -- as `tried`, of deliveries
-- Places of what a task has in `packed`, and of what its `EXTRA` has.
local FIELD, ID, STATE, META, STREAM, EXTRA = 1, 2, 3, 4, 5, 6
local BLOBS, PUSHES, OTHERS, LETTER, RETRY, STREAMED, WEBHOOKS, DELIVERY = 1, 2, 3, 4, 5, 6, 7, 8
local tasks = cmsgpack.unpack(packed)
local fields, metas, ids = {}, {}, {}
local some_buried, some_retried = false, false
for n = 1, #tasks do
  local task = tasks[n]
  fields[n], ids[n], metas[n] = task[FIELD], task[ID], meta_prefix .. task[ID]
  some_buried = some_buried or (task[EXTRA] and #task[EXTRA][LETTER] > 0)
  some_retried = some_retried or (task[EXTRA] and #task[EXTRA][RETRY] > 0)
end
local first = meta_prefix .. ids[1]
if not (may('SETEX', first, 1, '') and may('HDEL', inflight_key, 'field') and may('HDEL', started_key, 'field')) then
  return denied({{'SETEX', first, 1, ''}, {'HDEL', inflight_key, 'field'}, {'HDEL', started_key, 'field'}})
end
if some_buried or some_retried then
  local refusal = denied({
    {'HSET', letter_prefix .. 'id', 'field', ''}, {'ZADD', dead_key, 0, 'member'}, {'DEL', first}, {'SET', first, ''},
    {'HSET', messages_key, 'field', ''}, {'ZADD', scheduled_key, 0, 'member'}})
  if refusal then
    return refusal
  end
  call('ZCARD', dead_key) -- these fail before the first write if a key is of another type
  call('ZCARD', scheduled_key)
  call('HLEN', messages_key)
end
call('HLEN', started_key)
local some_tried = call('TYPE', tried_key).ok == 'set'
local some_cancelled = call('TYPE', cancelled_key).ok == 'zset'
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
  for n, value in pairs(recall(ended_key, ended_before_key, asked)) do
    values[asked[n]] = value
    states[asked[n]] = states[asked[n]] or STATES[string.sub(value, 1, 1)]
  end
end
find_ends({ids = ids, metas = metas})
states[''] = nil

local ends = {} -- to be remembered: id, value, id, value, …
local events, single_events = {}, {}
local function end_task(id, state, meta, stream, run, failed)
  local key = meta_prefix .. id
  local value = LETTERS[state] .. (run and run > 1 and run or '') .. (failed and ' ' .. failed or '')
  states[id], values[id] = STATES[LETTERS[state]], value
  ends[#ends + 1], ends[#ends + 2] = id, value
  if meta == '' then
    call('DEL', key)
  else
    call('SETEX', key, result_ttl_s, meta)
    try('PUBLISH', key, meta)
  end
  log_end(id, state, run, result_ttl_s)
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
local function close_run(id, is_delivery)
  local is_known = some_tried and id ~= '' and try('SREM', tried_key, id) == 1
  if not is_known and not (is_delivery and try('SREM', tried_deliveries_key, id) == 1) then
    return nil, nil, nil
  end
  local found = try('HMGET', task_prefix .. id, 'run', 'history', 'failed')
  try('UNLINK', task_prefix .. id)
  return tonumber(found[1] or nil), found[2], found[3] or nil
end
local function pay(extra, own_run) -- what the end of a task owes to others; returns those that it has ended
  local ended = {}
  for _, entry in ipairs(extra[WEBHOOKS]) do
    put_out(entry, own_run, wake_channel)
  end
  for _, step in ipairs(extra[PUSHES]) do
    local list, message = step[1], step[2]
    try('PUBLISH', wake_channel, push('LPUSH', list, message) or list)
  end
  for _, other in ipairs(extra[OTHERS]) do
    local id, state, meta, stream = other[1], other[2], other[3], other[4]
    find_ends({ids = {id}, metas = {meta_prefix .. id}})
    if not states[id] then
      local run = close_run(id)
      end_task(id, state, meta, stream, run)
      ended[#ended + 1] = {id, stream, run or 1}
      for _, entry in ipairs(other[5]) do
        put_out(entry, run, wake_channel)
      end
    end
  end
  return ended
end
local function bury(n, run, history, ended)
  local field, id, now = fields[n], ids[n], seconds()
  local letter, model, reason, error, attempts, attempt = unpack(tasks[n][EXTRA][LETTER])
  local key = letter_prefix .. letter
  local message = call('HGET', inflight_key, field)
  call('DEL', key) -- the letter of an earlier run
  call('HSET', key, 'message', message, 'queue', match(list_of(field), '^[^\6]*'),
    'list', list_of(field), 'task_id', id, 'model', model,
    'reason', reason, 'error', error, 'attempts', attempts, 'worker', worker_id,
    'history', '[' .. (history and history .. ',' or '') .. attempt .. ']', 'run', run or 1, 'stream', tasks[n][STREAM],
    'died_at', string.format('%.6f', now))
  if #ended > 0 then -- a redrive opens a run for these as well
    call('HSET', key, 'ended', cmsgpack.pack(ended))
  end
  call('EXPIRE', key, letter_ttl_s)
  call('ZADD', dead_key, now, letter)
  try('ZREMRANGEBYSCORE', dead_key, '-inf', now - tonumber(letter_ttl_s))
end
local function try_again(n)
  local task, id = tasks[n], ids[n]
  local delay_s, attempt = unpack(task[EXTRA][RETRY])
  call('HSET', messages_key, id, list_of(fields[n]) .. ' ' .. call('HGET', inflight_key, fields[n]))
  call('ZADD', scheduled_key, string.format('%.6f', seconds() + delay_s), id)
  -- Of deliveries there may be some for a day, and inferences look closely while there are any that were tried.
  local is_delivery = match(list_of(fields[n]), '^samphire%.webhooks') ~= nil
  local tried = is_delivery and tried_deliveries_key or tried_key
  note_attempt(task_prefix .. id, tried, id, attempt, {'attempts'}, letter_ttl_s)
  some_tried = some_tried or not is_delivery
  if task[META] == '' then
    call('DEL', metas[n])
  else
    call('SET', metas[n], task[META])
    try('PUBLISH', metas[n], task[META])
  end
  log_event(id, claim_of(worker_id, fields[n]), 'retrying', 'w', attempt)
  single_events[#single_events + 1] = {stream_for(id, task[STREAM]), 'retrying', id}
end
local function can_push_to(name)
  local list = CELERY .. name
  local fits = type(try('LLEN', list)) == 'number' or type(try('LLEN', list .. ':returned')) == 'number'
  return fits and not denied({{'LPUSH', list, ''}})
end
-- What says that some of what a task owes cannot be pushed.
local function not_pushed(n)
  local extra = tasks[n][EXTRA]
  for _, step in ipairs(extra and extra[PUSHES] or {}) do
    if not can_push_to(step[1]) then
      return 3
    end
  end
  local entries = extra and {extra[WEBHOOKS]} or {}
  for _, other in ipairs(extra and extra[OTHERS] or {}) do
    entries[#entries + 1] = other[5]
  end
  for _, some in ipairs(entries) do
    for _, entry in ipairs(some) do
      if not can_push_to(delivery_list(entry[2])) then
        return 5
      end
    end
  end
end
-- Whether the log has fewer outputs than the task has given out: then a restart of the broker has lost some.
local function lacks_outputs(n)
  local streamed = tasks[n][EXTRA] and tasks[n][EXTRA][STREAMED][1]
  if not streamed or streamed == 0 then
    return false
  end
  local log = read_log(ids[n])
  return not log or log.outputs ~= streamed
end
-- The run that a message ends that was sent anew after its task has failed.
local function new_run(n)
  local id = ids[n]
  local has_ended = states[id] == 'FAILURE'
  if has_ended and not has_failed(call('HGET', inflight_key, fields[n]), values[id], letter_prefix .. id) then
    return run_in(values[id] or 'F' .. (try('HGET', letter_prefix .. id, 'run') or '')) + 1
  end
end
-- Whether a message has failed in an earlier run than the one that is under way.
local function is_late_copy(n)
  local failed = some_tried and ids[n] ~= '' and try('HGET', task_prefix .. ids[n], 'failed')
  return type(failed) == 'string' and is_among(failed, call('HGET', inflight_key, fields[n]))
end
-- Whether an end is yet to be paid for: that of a cancelled task, whose canvas nobody has read so far.
local function owes(id)
  return states[id] == 'REVOKED' and (not values[id] or string.sub(values[id], 1, 1) == 'c')
end

local function settle(n)
  local id, state, extra = ids[n], tasks[n][STATE], tasks[n][EXTRA]
  if call('HEXISTS', inflight_key, fields[n]) == 0 then
    return 0
  end
  local unpushed = not_pushed(n)
  if unpushed then
    return unpushed
  end
  if is_late_copy(n) then
    return 1
  end
  local mark = some_cancelled and id ~= '' and call('ZSCORE', cancelled_key, id)
  if mark and not states[id] and match(mark, '%.5$') then -- its end is not remembered any more, and was written
    states[id], values[id] = 'REVOKED', 'c'
  end
  local opened, earlier = new_run(n), nil
  if state == 'succeeded' and (opened or not states[id]) and lacks_outputs(n) then
    return 4
  end
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
      forget(ended_key, ended_before_key, id)
      open_run(task_prefix .. id, tried_key, id, opened, earlier, letter_ttl_s)
      log_redriven(id, opened)
    end
    if not states[id] then
      try_again(n)
      for _, entry in ipairs(extra[WEBHOOKS]) do
        put_out(entry, tonumber(try('HGET', task_prefix .. id, 'run') or nil), wake_channel)
      end
    end
    return 1
  end
  local is_fresh, is_owing = not states[id] and id ~= '', owes(id)
  local run, history, failed = close_run(id, extra and #extra[DELIVERY] > 0)
  run = opened or run
  if is_fresh and opened then
    log_redriven(id, opened)
  end
  if is_fresh then
    failed = state == 'failed' and with_failed(failed or earlier or '', call('HGET', inflight_key, fields[n]))
    end_task(id, state, tasks[n][META], tasks[n][STREAM], run, failed)
  end
  if mark then
    try('ZREM', cancelled_key, id)
    try('SREM', running_key, id)
  end
  if not extra then
    return 1
  end
  if #extra[BLOBS] > 0 and states[id] ~= 'FAILURE' then -- a letter may be redriven, no other task runs again
    for _, blob in ipairs(extra[BLOBS]) do
      try('UNLINK', NAMESPACE .. blob)
    end
  end
  local delivery = extra[DELIVERY]
  local closes = #delivery > 0 and (is_fresh or is_owing)
  if closes and delivery[8] == 1 then
    note_replay(delivery, dead_key, letter_prefix)
  elseif closes then
    close_delivery(delivery, call('HGET', inflight_key, fields[n]), history, wake_channel)
  end
  local ended = {}
  if is_fresh or is_owing or id == '' then
    ended = pay(extra, run or (is_owing and run_in(values[id])) or nil)
  end
  if is_owing and #extra[PUSHES] + #extra[OTHERS] + #extra[WEBHOOKS] + #delivery > 0 then
    ends[#ends + 1], ends[#ends + 2] = id, 'C' .. (values[id] and match(values[id], '^%a(%d+)') or '')
    values[id] = ends[#ends]
  end
  if #extra[LETTER] > 0 and (is_fresh or id == '') then
    bury(n, run, history, ended)
  end
  return 1
end

begin_to_write(inflight_key)
local reply, done = {}, {}
for n = 1, #tasks do
  reply[n] = settle(n)
  if reply[n] == 1 then
    done[#done + 1] = fields[n]
  end
end
remember(ended_key, ended_before_key, ended_turn_key, tonumber(remember_s), ends)
if #done > 0 then
  call('HDEL', started_key, unpack(done))
  call('HDEL', inflight_key, unpack(done))
end
local single = #tasks == 1 and tasks[1][META] ~= '' and #tasks[1][META] <= tonumber(inline_max) and tasks[1][ID]
for _, event in ipairs(single_events) do
  tell(event[1], stream_max, stream_ttl_s, unpack(event, 2))
end
for stream, states_of in pairs(events) do
  for state, list in pairs(states_of) do
    if list == single then
      tell(stream, stream_max, stream_ttl_s, state, list, 'result', tasks[1][META])
    else
      tell(stream, stream_max, stream_ttl_s, state, list)
    end
  end
end
return reply
