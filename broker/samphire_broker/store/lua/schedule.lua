-- schedule: put claimed tasks aside until their time comes.
-- With: ended, log
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 scheduled   4 scheduled:messages   5 cancelled
--       6 ended   7 ended:before
-- ARGV  1 prefix of result keys   2.. field, task id, time in s since 1970, field, task id, time, …
-- Returns for each task 1, 0 (claim lost), 2 (its time has come, by this clock: it stays claimed), 3 (another message
-- of the same id was scheduled, and is replaced), or -3 (it is cancelled: it stays claimed and is to be settled as
-- such).
local inflight_key, started_key, scheduled_key, messages_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local cancelled_key, ended_key, ended_before_key = KEYS[5], KEYS[6], KEYS[7]
local meta_prefix = ARGV[1]
local refusal = denied({
  {'HSET', messages_key, 'field', ''}, {'ZADD', scheduled_key, 0, 'member'}, {'HDEL', inflight_key, 'field'},
  {'HDEL', started_key, 'field'}})
if refusal then
  return refusal
end
call('ZCARD', scheduled_key) -- these fail before the first write if a key is of another type
call('HLEN', messages_key)
call('HLEN', started_key)
local some_cancelled = call('TYPE', cancelled_key).ok == 'zset'
local time = call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local ids = {}
for i = 2, #ARGV, 3 do
  ids[#ids + 1] = ARGV[i + 1]
end
local remembered = recall(ended_key, ended_before_key, ids)
begin_to_write(inflight_key)
local reply = {}
for i = 2, #ARGV, 3 do
  local field, id, due = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local value = remembered[#reply + 1]
  local state = state_in(try('GET', meta_prefix .. id)) or (value and STATES[string.sub(value, 1, 1)])
  local message = call('HGET', inflight_key, field)
  local verdict = message and 1 or 0
  if message and (state == 'REVOKED' or (some_cancelled and call('ZSCORE', cancelled_key, id))) then
    verdict = -3
  elseif message and tonumber(due) <= now then
    verdict = 2
  elseif message then
    if call('HSET', messages_key, id, list_of(field) .. ' ' .. message) == 0 then
      verdict = 3
    end
    call('ZADD', scheduled_key, due, id)
    call('HDEL', started_key, field)
    call('HDEL', inflight_key, field)
    log_event(id, '', 'scheduled')
  end
  reply[#reply + 1] = verdict
end
return reply
