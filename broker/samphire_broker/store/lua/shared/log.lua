-- log: the event log of a task that is streamed or followed: a stream of its own, `log:<id>`; other tasks have none.
-- An entry's id is <run * 2^20 + attempt>-<number of its last event in that attempt>: entries are in the order of runs,
-- attempts and events, and none can be written twice. An attempt is a start, whether it counts in the budget or not; 0
-- is what comes before the first. Fields of an entry: e (event), t (time in s), p (id of the entry before it); of outputs
-- also d (MessagePack), n (how many), o and b (outputs and their bytes in this attempt so far); of an end o and b.
-- `logs` holds, of each task with a log whose run has not ended, where it stands: "<run * 2^20 + attempt> <number>
-- <outputs> <bytes> <bytes held, roughly> <claim that writes it>". What is written is told on the task's channel, a
-- line each: the epoch, the id, the fields; after an empty line the data.
local LOGS, LOG = NAMESPACE .. 'logs', NAMESPACE .. 'log:'
local ATTEMPTS = 2 ^ 20 -- more than a run can have
local LOG_ENTRIES, LOG_BYTES = 10000, 16 * 2 ^ 20 -- about as much is kept of a log
local TOLD_BYTES = 16384 -- a larger entry is told of, and not told
local LIVE_S = 30 * 86400 -- a log of a task that has not ended goes this long after its last event

local some_logged = try('TYPE', LOGS).ok == 'hash'

local function now_text()
  local time = call('TIME')
  return time[1] .. '.' .. string.format('%06d', time[2])
end
local function log_position(log, seq) -- of the event with a number, or of the last one
  return string.format('%.0f-%.0f', log.major, seq or log.seq)
end
local function tell_readers(id, place, ...)
  local epoch, fields, data, size = try('GET', NAMESPACE .. 'epoch'), {...}, '', 0
  for n = 1, #fields do
    fields[n] = tostring(fields[n])
    size = size + #fields[n]
  end
  if fields[#fields - 1] == 'd' then
    data, fields[#fields], fields[#fields - 1] = fields[#fields], nil, nil
  end
  local head = (type(epoch) == 'string' and match(epoch, '^%w+') or '0') .. '\n' .. place
  if size <= TOLD_BYTES then
    head = head .. '\n' .. table.concat(fields, '\n') .. '\n\n' .. data
  end
  try('PUBLISH', CHANNEL .. 'log:' .. id, head)
end
-- Claims are named with their worker, so that it can be seen whether one is still in flight.
local function claim_of(worker, field)
  return worker .. '|' .. field
end
local function is_live(log) -- whether an attempt is under way that writes it
  local worker, field = match(log.claim, '^([^|]+)|(.*)$')
  return worker ~= nil and try('HEXISTS', NAMESPACE .. 'worker:' .. worker .. ':inflight', field) == 1
end
local function run_of(log)
  return math.floor(log.major / ATTEMPTS)
end
local function read_log(id)
  local state = some_logged and id ~= '' and try('HGET', LOGS, id)
  if type(state) ~= 'string' then
    return nil
  end
  local major, seq, outputs, bytes, held, claim = match(state, '^(%d+) (%d+) (%d+) (%d+) (%d+) (.*)$')
  return major and {major = tonumber(major), seq = tonumber(seq), outputs = tonumber(outputs), bytes = tonumber(bytes),
    held = tonumber(held), claim = claim}
end

-- Append one entry of `count` events and keep where the log stands; returns the error where it cannot be written. The
-- older half of a log that is full of bytes goes.
local function log_entry(id, log, event, count, time, ...)
  local before = log.before or log_position(log)
  log.seq, log.before = log.seq + count, nil
  local place = log_position(log)
  local done = try('XADD', LOG .. id, 'MAXLEN', '~', LOG_ENTRIES, place, 'e', event, 't', time, 'p', before, ...)
  if type(done) == 'table' and done.err then
    return done
  end
  if log.held > LOG_BYTES then
    local length = try('XLEN', LOG .. id)
    try('XTRIM', LOG .. id, 'MAXLEN', math.floor(length / 2))
    log.held = log.held / 2
  end
  local numbers = string.format('%.0f %.0f %.0f %.0f %.0f', log.major, log.seq, log.outputs, log.bytes, log.held)
  local kept = try('HSET', LOGS, id, numbers .. ' ' .. log.claim)
  if type(kept) == 'table' and kept.err then
    return kept
  end
  some_logged = true
  try('EXPIRE', LOG .. id, LIVE_S)
  try('EXPIRE', LOGS, LIVE_S)
  tell_readers(id, place, 'e', event, 't', time, 'p', before, ...)
end
-- Tell of what has become of a claim of a task ('' where it was none), if the task has a log: nobody writes it then. A
-- copy that runs beside the attempt which writes it is not told of.
local function log_event(id, claim, event, ...)
  local log = read_log(id)
  if log and (log.claim == claim or not is_live(log)) then
    log.claim = ''
    log_entry(id, log, event, 1, now_text(), ...)
  end
end
-- The last event of a run: with the number of its outputs and their bytes, so that a reader knows that it has all.
local function log_end(id, event, run, lifetime_s)
  local log = read_log(id)
  if not log then
    return
  end
  if run and run > run_of(log) then
    log.before, log.major, log.seq, log.outputs, log.bytes = log_position(log), run * ATTEMPTS, 0, 0, 0
  end
  log_entry(id, log, event, 1, now_text(), 'o', log.outputs, 'b', log.bytes)
  try('EXPIRE', LOG .. id, lifetime_s)
  try('HDEL', LOGS, id)
end
-- The state of a log that begins, or goes on in another run after its last one has ended.
local function new_log(id, run)
  local last = try('XREVRANGE', LOG .. id, '+', '-', 'COUNT', 1)
  local before = last and not last.err and last[1] and last[1][1] or '0-0'
  local major, seq = match(before, '^(%d+)-(%d+)$')
  local log = {major = run * ATTEMPTS, seq = 0, outputs = 0, bytes = 0, held = 0, claim = '', before = before}
  if tonumber(major) >= log.major then -- of the same run, of which the state was lost
    log.major, log.seq = tonumber(major), tonumber(seq)
  end
  return log
end
local function log_redriven(id, run)
  if try('EXISTS', LOG .. id) == 1 then
    log_entry(id, new_log(id, run), 'redriven', 1, now_text())
  end
end
-- The next attempt, by a claim; at is when it began, "" for now.
local function log_attempt(id, log, claim, at)
  log.before = log.before or log_position(log)
  log.major, log.seq, log.outputs, log.bytes, log.claim = log.major + 1, 0, 0, 0, claim
  return log_entry(id, log, 'started', 1, at == '' and now_text() or at)
end
