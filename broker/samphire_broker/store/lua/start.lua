-- start: mark claimed tasks as running.
-- With: ended, attempts
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
local tail = ',"result":{"hostname":' .. cjson.encode(ARGV[4]) .. ',"pid":' .. ARGV[5] .. '}'
tail = tail .. ',"traceback":null,"children":[],"date_done":null}'
local tasks = cmsgpack.unpack(ARGV[8])
local metas, hashes, fields, ids = {}, {}, {}, {}
for n = 1, #tasks do
  fields[n], ids[n] = tasks[n][1], tasks[n][2]
  metas[n], hashes[n] = ARGV[1] .. ids[n], ARGV[2] .. ids[n]
end
if not (may('MSET', metas[1], '') and may('HSET', KEYS[2], 'field', '') and may('HDEL', KEYS[1], 'field')) then
  return denied({{'MSET', metas[1], ''}, {'HSET', KEYS[2], 'field', ''}, {'HDEL', KEYS[1], 'field'}})
end
local old = call('MGET', unpack(metas))
local some_cancelled = call('TYPE', KEYS[3]).ok == 'zset'
local some_tried = call('EXISTS', unpack(hashes)) > 0
local holder = try('GET', KEYS[4]) -- a key of another type is nobody's
local alone_id, alone_with = match(type(holder) == 'string' and holder or '', '^(%S+) %d+ (.*)$')
local is_alone = alone_id and alone_id ~= ARGV[6]
local states, asked, places = {}, {}, {}
for n = 1, #tasks do
  states[n] = state_in(old[n])
  if not states[n] or states[n] == 'FAILURE' then
    asked[#asked + 1], places[#places + 1] = ids[n], n
  end
end
local remembered = {}
for n, value in pairs(recall(KEYS[6], KEYS[7], asked)) do
  remembered[places[n]] = value
end
local reply, written, started, dropped, runs = {}, {}, {}, {}, {}
local function verdict(n)
  local field, id = fields[n], ids[n]
  local value = remembered[n]
  local state = states[n] or (value and STATES[string.sub(value, 1, 1)])
  if call('HEXISTS', KEYS[1], field) == 0 then
    return -1
  end
  if state == 'REVOKED' or (some_cancelled and call('ZSCORE', KEYS[3], id)) then
    return -3
  end
  local tried = some_tried and try('HMGET', hashes[n], 'attempts', 'crashes', 'losses', 'shared', 'failed')
  tried = tried and not tried.err and tried or {}
  local message = (state == 'FAILURE' or tried[5]) and call('HGET', KEYS[1], field)
  local is_copy = state == 'FAILURE' and has_failed(message, value, ARGV[3] .. id)
  is_copy = is_copy or (tried[5] and is_among(tried[5], message)) -- of one whose run is over
  if state == 'SUCCESS' or is_copy then
    dropped[#dropped + 1] = field
    return -2
  end
  if is_alone and (alone_with == '' or model_of(field) == alone_with) then
    -- What a call whose reply was lost has begun may go on.
    if not match(field, '^%d+!') and call('HEXISTS', KEYS[2], field) == 0 then
      return -4
    end
  end
  if state == 'FAILURE' then
    runs[#runs + 1] = {n, run_in(value or 'F' .. tostring(try('HGET', ARGV[3] .. id, 'run') or '')) + 1, value}
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
begin_to_write(KEYS[1])
for _, run in ipairs(runs) do
  local n = run[1]
  forget(KEYS[6], KEYS[7], ids[n])
  open_run(hashes[n], KEYS[5], ids[n], run[2], failed_in(run[3]), ARGV[7])
end
if #written > 0 then
  call('MSET', unpack(written))
  call('HSET', KEYS[2], unpack(started))
end
if #dropped > 0 then
  call('HDEL', KEYS[1], unpack(dropped))
  call('HDEL', KEYS[2], unpack(dropped)) -- it may have been started before, by a call whose reply was lost
end
return reply
