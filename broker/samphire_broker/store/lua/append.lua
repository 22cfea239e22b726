-- append: write what running tasks give out into their logs, in the order of each.
-- With: ended, log
-- KEYS  1 worker:<wid>:inflight   2 ended   3 ended:before
-- ARGV  1 worker id   2 prefix of task hashes   3 prefix of result keys   4.. of each entry: claim, task id, when it was
--       started (s since 1970), number of its first event in the attempt, how many events, event, time, outputs so far,
--       their bytes so far, data
-- The log begins with the first entry, or a new attempt in it: number 1 is its start, so the first entry has number 2.
-- Of a copy of the message that runs beside an attempt nothing is written, and nothing of a task that has ended: a
-- message that is sent again after a failure begins its run with its start.
-- Returns for each entry 1 (it stands there, or is a copy's that need not), or 0 (claim lost), or 2 (this attempt cannot
-- go on: the place is taken by other data, an entry before it is missing since a restart of the broker has lost it, or
-- the task has ended), or 3 (the log cannot be written). An entry that is repeated is found, and not written again.
local inflight_key, ended_key, ended_before_key = KEYS[1], KEYS[2], KEYS[3]
local worker_id, task_prefix, meta_prefix = ARGV[1], ARGV[2], ARGV[3]
local refusal = denied({{'XADD', LOG .. 'id', '*', 'field', ''}, {'HSET', LOGS, 'field', ''}})
if refusal then
  return refusal
end
-- A full memory passes: then all of it is tried again.
local full
local function verdict_of(failed)
  full = full or (match(failed.err, 'OOM') and failed)
  return 3
end
local function is_there(id, log, last, data)
  local place = log_position(log, last)
  local found = call('XRANGE', LOG .. id, place, place)[1]
  if not found then
    return true -- trimmed since
  end
  for n = 1, #found[2], 2 do
    if found[2][n] == 'd' then
      return found[2][n + 1] == data
    end
  end
  return false
end
local function has_ended(id)
  local state = state_in(try('GET', meta_prefix .. id))
  if state then
    return state == 'SUCCESS' or state == 'FAILURE' or state == 'REVOKED'
  end
  return recall(ended_key, ended_before_key, {id})[1] ~= nil
end
local function append(n)
  local field, id, started_at = ARGV[n], ARGV[n + 1], ARGV[n + 2]
  local first, count = tonumber(ARGV[n + 3]), tonumber(ARGV[n + 4])
  local event, time, outputs, bytes, data = ARGV[n + 5], ARGV[n + 6], ARGV[n + 7], ARGV[n + 8], ARGV[n + 9]
  if call('HEXISTS', inflight_key, field) == 0 then
    return 0
  end
  local claim = claim_of(worker_id, field)
  local log = read_log(id)
  if log and log.claim ~= claim and is_live(log) then
    return 1
  end
  if not log or log.claim ~= claim then
    if first ~= 2 or has_ended(id) then
      return 2
    end
    log = log or new_log(id, tonumber(try('HGET', task_prefix .. id, 'run') or nil) or 1)
    local failed = log_attempt(id, log, claim, started_at)
    if failed then
      return verdict_of(failed)
    end
  end
  local last = first + count - 1
  if last <= log.seq then
    return is_there(id, log, last, data) and 1 or 2
  end
  if first ~= log.seq + 1 then
    return 2
  end
  log.outputs, log.bytes, log.held = tonumber(outputs), tonumber(bytes), log.held + #data
  local failed = log_entry(id, log, event, count, time, 'n', count, 'o', outputs, 'b', bytes, 'd', data)
  return failed and verdict_of(failed) or 1
end
local reply = {}
for n = 4, #ARGV, 10 do
  reply[#reply + 1] = append(n)
end
return full or reply
