-- cancel: end tasks, or mark them where somebody else has to.
-- With: ended, pages, log
-- KEYS  1 sub:cancels   2 cancelled   3 scheduled   4 scheduled:messages   5 cancelled:lately
--       6 worker:<wid>:started, of the worker that asks   7 sub:queues   8 workers   9 ended   10 ended:before
--      11 ended:turn   12 cancelled:running
-- ARGV  1 prefix of result keys   2 lifetime of results in s   3 longest event stream   4 lifetime of streams in s
--       5 lifetime of marks in s   6 most marks   7 result (JSON with an empty task id)   8 channel to wake lanes
--       9 most requests that are taken from sub:cancels   10 prefix of the answers to requests
--      11 the intake   12 prefix of worker keys   13 prefix of letters   14 prefix of task hashes
--      15 how long it is remembered that a task has ended, in s   16 how many requests follow that were answered with
--         "nowhere", and whose worker has looked for queues since   17.. these, then ids that a revocation names
-- A request is "<stream> <task id>", of a client that names a task of its own: the task ends now, and its message is
-- dropped when it is claimed. Where little is queued it is looked for first: an id that is nowhere is no task, and
-- nothing changes. A revocation goes to all workers of all applications, and may name anybody's task: a scheduled
-- one ends now, any other is marked, and ends if it is ever claimed. A running one is marked, and ends where it runs:
-- every worker that asks is told of the marked ones that it has started. The mark of a task that has ended here has .5
-- behind its time. A client whose task has ended, and whose result is gone, is told by an answer of its own.
-- Returns task id, verdict, task id, verdict, …: "cancelled", "marked", the state of a task past cancelling or
-- running elsewhere, "nowhere <stream>" (to be asked again once the worker has looked for queues), "unknown", and
-- "running" for those that the worker that asks has started.
local cancels_key, cancelled_key, scheduled_key, messages_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local lately_key, own_started_key, queues_key, workers_key, ended_key = KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local ended_before_key, ended_turn_key, running_key = KEYS[10], KEYS[11], KEYS[12]
local meta_prefix, result_ttl_s, stream_max, stream_ttl_s, mark_ttl_s = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local marks_max, revoked_meta, wake_channel, requests_max = ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local answer_prefix, intake, worker_prefix, letter_prefix = ARGV[10], ARGV[11], ARGV[12], ARGV[13]
local task_prefix, remember_s, again_count = ARGV[14], ARGV[15], ARGV[16]
local requests = {}
if call('TYPE', cancels_key).ok == 'list' then
  requests = call('LRANGE', cancels_key, 0, requests_max - 1)
end
local from_list = #requests
local mark_kind = call('TYPE', cancelled_key).ok
local can_mark = mark_kind == 'zset' or mark_kind == 'none'
local asked_again = tonumber(again_count)
if from_list > 0 or #ARGV > 16 then
  local refusal = denied({
    {'SETEX', meta_prefix .. 'id', 1, ''}, {'SETEX', answer_prefix .. 'id', 1, ''}, {'SET', lately_key, ''},
    {'ZADD', cancelled_key, 0, 'member'}, {'RPUSH', CELERY .. intake, ''}, {'ZREM', scheduled_key, 'member'},
    {'HDEL', messages_key, 'field'}, {'LTRIM', cancels_key, 0, -1}})
  if refusal then
    return refusal
  end
end
call('ZCARD', scheduled_key) -- these fail before the first write if a key is of another type
call('HLEN', messages_key)
call('HLEN', own_started_key)
local time = call('TIME')
local reply, ends = {}, {}

-- ---- where messages are
-- What is searched in one call, for all ids together; beyond it an id is believed.
local looks, pages, bytes = 4000, 20000, CALL_BYTES
local places, too_many
local function add_place(found)
  places[#places + 1] = found
  for _, message in ipairs(found) do
    bytes = bytes - #message
  end
  too_many = bytes < 0 or pages < 0
end
local function read(page) -- all that is there, a page at a time
  local first, seen = 0, nothing()
  too_many = too_many or pages < 0
  while first <= looks and not too_many do
    local asked = next_page(seen)
    pages = pages - 1
    local found = page(first, first + asked - 1)
    if found.err or #found == 0 then
      return
    end
    note_page(seen, found)
    add_place(found)
    first = first + asked
  end
end
local function read_hash(hash, pattern) -- of each value what the pattern finds
  local fields = try('HKEYS', hash)
  fields = fields.err and {} or fields
  read(function(first, last)
    local found = first < #fields and try('HMGET', hash, unpack(fields, first + 1, math.min(last + 1, #fields))) or {}
    for n, value in ipairs(found) do
      found[n] = match(value, pattern) or value
    end
    return found
  end)
end
local function find_places()
  places = {}
  local queues = try('SMEMBERS', queues_key)
  queues = queues.err and {} or queues
  queues[#queues + 1] = intake
  for _, queue in ipairs(queues) do
    for _, suffix in ipairs({'', '\6\0223', '\6\0226', '\6\0229'}) do
      read(function(first, last)
        return try('LRANGE', CELERY .. queue .. suffix, first, last)
      end)
      if too_many then
        return
      end
    end
  end
  local members = try('SMEMBERS', workers_key)
  for _, worker in ipairs(members.err and {} or members) do
    read_hash(worker_prefix .. worker .. ':inflight', '^.*$')
  end
  read_hash(messages_key, '^%S+ (.*)$') -- without its list
end
local function is_coded(message) -- Celery's own steps of a canvas: the ids of those to come cannot be seen in them
  return string.find(message, '"body_encoding": ?"base64"')
end
local function each_message(look) -- until it returns true; nothing is said where there is too much
  if not places then
    find_places()
  end
  for _, messages in ipairs(too_many and {} or places) do
    for _, message in ipairs(messages) do
      looks = looks - 1
      if looks > 0 and look(message) then
        return true
      end
    end
  end
  return false
end
-- Whether a message is found that is a task's, or may bring it about; where there is too much, it is believed.
local function is_somewhere(id)
  local found = each_message(function(message)
    return is_coded(message) or string.find(message, id, 1, true)
  end)
  return found or too_many or looks <= 0
end
-- Whether a message of a task that has failed is found that has not: then it waits for its next run.
local function is_sent_again(id, remembered, letter)
  local names = {'"correlation_id":"' .. id .. '"', '"correlation_id": "' .. id .. '"'}
  return each_message(function(message)
    local is_its_own = string.find(message, names[1], 1, true) or string.find(message, names[2], 1, true)
    return is_its_own and not has_failed(message, remembered, letter)
  end)
end

-- ---- what becomes of a task
local function answer(id, word)
  call('SETEX', answer_prefix .. id, 10, word)
end
local WORDS = {S = 'succeeded', F = 'failed', C = 'cancelled', c = 'cancelled', E = 'expired'}
local function mark(id, ended)
  if can_mark then
    call('ZADD', cancelled_key, time[1] + (ended and 0.5 or 0), id)
    call('SET', lately_key, '1', 'EX', 60)
  end
end
local function return_message(id, value) -- what it owes to others is settled by whoever claims it
  local list, message = match(value, '^(%S+) (.*)$')
  local where = list and push('RPUSH', list, message)
  if where or not list then
    call('ZREM', scheduled_key, id)
    call('HDEL', messages_key, id)
    try('PUBLISH', wake_channel, where or '')
  end
end
local function end_task(id, stream, run)
  local key = meta_prefix .. id
  local result = string.gsub(revoked_meta, '"task_id":""', function() return '"task_id":' .. cjson.encode(id) end, 1)
  call('SETEX', key, result_ttl_s, result)
  try('PUBLISH', key, result)
  log_end(id, 'cancelled', run, result_ttl_s)
  ends[#ends + 1], ends[#ends + 2] = id, 'c' .. (run > 1 and run or '')
  if run > 1 then
    tell(stream_for(id, stream), stream_max, stream_ttl_s, 'cancelled', id, 'run', run)
  else
    tell(stream_for(id, stream), stream_max, stream_ttl_s, 'cancelled', id)
  end
end
local function cancel(id, stream, named, is_sure)
  local stored = state_in(try('GET', meta_prefix .. id))
  local remembered = recall(ended_key, ended_before_key, {id})[1]
  local waiting = call('HGET', messages_key, id)
  local letter = letter_prefix .. id
  local state = stored
  if not stored or stored == 'PENDING' then
    state = remembered and STATES[string.sub(remembered, 1, 1)] or (call('EXISTS', letter) == 1 and 'FAILURE') or stored
  end
  local run = tonumber(try('HGET', task_prefix .. id, 'run') or nil) or 1
  if state == 'FAILURE' then
    local message = match(waiting or '', '^%S+ (.*)$')
    if (message and not has_failed(message, remembered, letter)) or is_sent_again(id, remembered, letter) then
      run = run_in(remembered or 'F' .. (try('HGET', letter, 'run') or '')) + 1
      state = nil
    end
  elseif named and not state and not waiting and not is_somewhere(id) then
    if is_sure then
      answer(id, 'unknown')
    end
    return is_sure and 'unknown' or 'nowhere ' .. stream
  end
  if state == 'STARTED' then
    mark(id)
    try('SADD', running_key, id)
    try('EXPIRE', running_key, mark_ttl_s)
    return state
  end
  local how = remembered and string.sub(remembered, 1, 1)
  if state == 'SUCCESS' or state == 'FAILURE' or (state == 'REVOKED' and (how == 'C' or how == 'c' or how == 'E')) then
    if named and not stored then
      answer(id, how and WORDS[how] or 'failed')
    end
    if how ~= 'c' then
      return state
    end
  end
  -- On a revocation any other worker of Celery's writes REVOKED too; the message is ours to drop all the same.
  local verdict = state == 'REVOKED' and state or 'marked'
  local ends_now = verdict == 'marked' and (named or waiting)
  mark(id, ends_now or state == 'REVOKED')
  if ends_now then
    verdict = 'cancelled'
    end_task(id, stream, run)
  end
  if waiting then
    return_message(id, waiting)
  end
  return verdict
end

-- ---- all of them
if from_list > 0 then
  call('LTRIM', cancels_key, 0, -1) -- a write that needs no memory lets the others through when memory is full
end
for i = 17, 16 + asked_again do
  requests[#requests + 1] = ARGV[i]
end
for n = 1, #requests do
  local stream, id = match(requests[n], '^(%S*) (.+)$')
  if id then
    reply[#reply + 1] = id
    reply[#reply + 1] = cancel(id, stream, true, n > from_list)
  end
end
for i = 17 + asked_again, #ARGV do
  reply[#reply + 1] = ARGV[i]
  reply[#reply + 1] = cancel(ARGV[i], '', false, true)
end
remember(ended_key, ended_before_key, ended_turn_key, tonumber(remember_s), ends)
if can_mark and #reply > 0 then
  try('ZREMRANGEBYSCORE', cancelled_key, '-inf', time[1] - mark_ttl_s)
  try('ZREMRANGEBYRANK', cancelled_key, 0, -marks_max - 1)
end
if from_list > 0 then
  call('LTRIM', cancels_key, from_list, -1)
end
if try('EXISTS', running_key) == 1 then
  local started = call('HVALS', own_started_key)
  for first = 1, #started, 1000 do
    local last = math.min(first + 999, #started)
    local marks = try('SMISMEMBER', running_key, unpack(started, first, last))
    for n = first, marks.err and 0 or last do
      if marks[n - first + 1] == 1 then
        reply[#reply + 1] = started[n]
        reply[#reply + 1] = 'running'
      end
    end
  end
end
return reply
