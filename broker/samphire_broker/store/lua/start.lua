-- start: mark claimed tasks as running.
-- With: ended, attempts, log
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 cancelled   4 alone   5 tried   6 ended   7 ended:before
-- ARGV  1 prefix of result keys   2 prefix of task hashes   3 prefix of letters   4 host name   5 process id
--       6 worker id   7 lifetime of task hashes in s   8 MessagePack: array of [field, task id]
-- Returns for each task 0, or [attempts so far, those of them that took a worker or a model's process down, endpoints
-- that died with it, those of the crashes that took down what all workers share], or -1 (claim lost: not ours any
-- more), or -2 (the task has ended: the message is dropped as a copy), or -3 (it is cancelled: it stays claimed and is
-- to be settled as such), or -4 (another worker is alone with its model: it stays claimed and is to be started later;
-- what was claimed before anything was tried need not wait, for that one waits for it).
-- A message that is sent anew after its task has failed opens the task's next run; a copy of the one that failed does
-- not. The running state has no lifetime of its own: settling, failing, releasing and reaping all replace it.
local inflight_key, started_key, cancelled_key, alone_key, tried_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local ended_key, ended_before_key = KEYS[6], KEYS[7]
local meta_prefix, task_prefix, letter_prefix, hostname, process_id = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local worker_id, task_ttl_s, packed = ARGV[6], ARGV[7], ARGV[8]
local time = call('TIME')
local tail = ',"result":{"hostname":' .. cjson.encode(hostname) .. ',"pid":' .. process_id
tail = tail .. ',"started_at":' .. time[1] .. '.' .. string.format('%06d', time[2]) .. '}'
tail = tail .. ',"traceback":null,"children":[],"date_done":null}'
local tasks = cmsgpack.unpack(packed)
local metas, hashes, fields, ids = {}, {}, {}, {}
for n = 1, #tasks do
  fields[n], ids[n] = tasks[n][1], tasks[n][2]
  metas[n], hashes[n] = meta_prefix .. ids[n], task_prefix .. ids[n]
end
if not (may('MSET', metas[1], '') and may('HSET', started_key, 'field', '') and may('HDEL', inflight_key, 'field')) then
  return denied({{'MSET', metas[1], ''}, {'HSET', started_key, 'field', ''}, {'HDEL', inflight_key, 'field'}})
end
local old = call('MGET', unpack(metas))
local some_cancelled = call('TYPE', cancelled_key).ok == 'zset'
local some_tried = call('EXISTS', unpack(hashes)) > 0
local holder = try('GET', alone_key) -- a key of another type is nobody's
local alone_id, alone_with = match(type(holder) == 'string' and holder or '', '^(%S+) %d+ (.*)$')
local is_alone = alone_id and alone_id ~= worker_id
local states, asked, places = {}, {}, {}
for n = 1, #tasks do
  states[n] = state_in(old[n])
  if not states[n] or states[n] == 'FAILURE' then
    asked[#asked + 1], places[#places + 1] = ids[n], n
  end
end
local remembered = {}
for n, value in pairs(recall(ended_key, ended_before_key, asked)) do
  remembered[places[n]] = value
end
local reply, written, started, dropped, runs = {}, {}, {}, {}, {}
local function verdict(n)
  local field, id = fields[n], ids[n]
  local value = remembered[n]
  local state = states[n] or (value and STATES[string.sub(value, 1, 1)])
  if call('HEXISTS', inflight_key, field) == 0 then
    return -1
  end
  if state == 'REVOKED' or (some_cancelled and call('ZSCORE', cancelled_key, id)) then
    return -3
  end
  local tried = some_tried and try('HMGET', hashes[n], 'attempts', 'crashes', 'losses', 'shared', 'failed')
  tried = tried and not tried.err and tried or {}
  local message = (state == 'FAILURE' or tried[5]) and call('HGET', inflight_key, field)
  local is_copy = state == 'FAILURE' and has_failed(message, value, letter_prefix .. id)
  is_copy = is_copy or (tried[5] and is_among(tried[5], message)) -- of one whose run is over
  if state == 'SUCCESS' or is_copy then
    dropped[#dropped + 1] = field
    return -2
  end
  if is_alone and (alone_with == '' or model_of(field) == alone_with) then
    -- What a call whose reply was lost has begun may go on.
    if not match(field, '^%d+!') and call('HEXISTS', started_key, field) == 0 then
      return -4
    end
  end
  if state == 'FAILURE' then
    runs[#runs + 1] = {n, run_in(value or 'F' .. tostring(try('HGET', letter_prefix .. id, 'run') or '')) + 1, value}
  end
  written[#written + 1], written[#written + 2] = metas[n], '{"status":"STARTED","task_id":' .. cjson.encode(id) .. tail
  started[#started + 1], started[#started + 2] = field, id
  if not (tried[1] or tried[3]) then
    return 0
  end
  return {tonumber(tried[1] or 0), tonumber(tried[2] or 0), tonumber(tried[3] or 0), tonumber(tried[4] or 0)}
end
for n = 1, #tasks do
  reply[n] = verdict(n)
end
begin_to_write(inflight_key)
for _, run in ipairs(runs) do
  local n = run[1]
  forget(ended_key, ended_before_key, ids[n])
  open_run(hashes[n], tried_key, ids[n], run[2], failed_in(run[3]), task_ttl_s)
  log_redriven(ids[n], run[2])
end
if #written > 0 then
  call('MSET', unpack(written))
  call('HSET', started_key, unpack(started))
end
for n = 1, some_logged and #started or 0, 2 do
  local claim, id = claim_of(worker_id, started[n]), started[n + 1]
  local log = read_log(id)
  if log and log.claim ~= claim and not is_live(log) then -- a copy that runs beside it writes nothing
    log_attempt(id, log, claim, '')
  end
end
if #dropped > 0 then
  call('HDEL', inflight_key, unpack(dropped))
  call('HDEL', started_key, unpack(dropped)) -- it may have been started before, by a call whose reply was lost
end
return reply
