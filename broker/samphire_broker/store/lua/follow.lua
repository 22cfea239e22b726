-- follow: begin the logs of tasks that somebody follows, with a snapshot; those of the ended and of the unknown do not.
-- With: ended, log
-- KEYS  1 sub:follows   2 ended   3 ended:before   4 scheduled:messages
-- ARGV  1 prefix of result keys   2 prefix of task hashes   3 most requests   4 most logs that are begun so
-- Returns the number of requests that were served.
local requests_key, ended_key, ended_before_key, messages_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local meta_prefix, task_prefix, requests_max, logs_max = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local FOLLOWED_S = 86400 -- a log that nothing is written to but that it is followed
if call('TYPE', requests_key).ok ~= 'list' then
  return 0
end
local refusal = denied({{'LTRIM', requests_key, 0, -1}})
if refusal then
  return refusal
end
local requests = call('LRANGE', requests_key, 0, requests_max - 1)
local remembered = recall(ended_key, ended_before_key, requests)
local WORDS = {PENDING = 'queued', STARTED = 'running', RETRY = 'retrying'}
local room = tonumber(logs_max) - (some_logged and call('HLEN', LOGS) or 0)
call('LTRIM', requests_key, #requests, -1) -- a write that needs no memory lets the others through when memory is full
-- Whether a log is there, or is being written.
local function is_kept(id)
  local log = read_log(id)
  return log and (is_live(log) or try('EXISTS', LOG .. id) == 1)
end
-- A log that has gone with its lifetime leaves where it stood; some of these are looked for each time.
for _, id in ipairs(some_logged and try('HRANDFIELD', LOGS, 20) or {}) do
  if not is_kept(id) then
    try('HDEL', LOGS, id)
  end
end
for n, id in ipairs(requests) do
  local state = state_in(try('GET', meta_prefix .. id)) or (remembered[n] and 'ended') or 'PENDING'
  if WORDS[state] and room > 0 and #id <= 255 and not is_kept(id) then
    local is_scheduled = state == 'PENDING' and try('HEXISTS', messages_key, id) == 1
    local log = new_log(id, tonumber(try('HGET', task_prefix .. id, 'run') or nil) or 1)
    log_entry(id, log, 'snapshot', 1, now_text(), 's', is_scheduled and 'scheduled' or WORDS[state])
    try('EXPIRE', LOG .. id, FOLLOWED_S)
    room = room - 1
  end
end
return #requests
