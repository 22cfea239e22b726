-- schedule: put claimed tasks aside until their time comes.
-- With: ended
-- KEYS  1 worker:<wid>:inflight   2 worker:<wid>:started   3 scheduled   4 scheduled:messages   5 cancelled
--       6 ended   7 ended:before
-- ARGV  1 prefix of result keys   2.. field, task id, time in s since 1970, field, task id, time, …
-- Returns for each task 1, 0 (claim lost), 2 (its time has come, by this clock: it stays claimed), 3 (another message
-- of the same id was scheduled, and is replaced), or -3 (it is cancelled: it stays claimed and is to be settled as
-- such).
local refusal = denied({
  {'HSET', KEYS[4], 'field', ''}, {'ZADD', KEYS[3], 0, 'member'}, {'HDEL', KEYS[1], 'field'},
  {'HDEL', KEYS[2], 'field'}})
if refusal then
  return refusal
end
call('ZCARD', KEYS[3]) -- these fail before the first write if a key is of another type
call('HLEN', KEYS[4])
call('HLEN', KEYS[2])
local some_cancelled = call('TYPE', KEYS[5]).ok == 'zset'
local time = call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local ids = {}
for i = 2, #ARGV, 3 do
  ids[#ids + 1] = ARGV[i + 1]
end
local remembered = recall(KEYS[6], KEYS[7], ids)
begin_to_write(KEYS[1])
local reply = {}
for i = 2, #ARGV, 3 do
  local field, id, due = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local value = remembered[#reply + 1]
  local state = state_in(try('GET', ARGV[1] .. id)) or (value and STATES[string.sub(value, 1, 1)])
  local message = call('HGET', KEYS[1], field)
  local verdict = message and 1 or 0
  if message and (state == 'REVOKED' or (some_cancelled and call('ZSCORE', KEYS[5], id))) then
    verdict = -3
  elseif message and tonumber(due) <= now then
    verdict = 2
  elseif message then
    if call('HSET', KEYS[4], id, list_of(field) .. ' ' .. message) == 0 then
      verdict = 3
    end
    call('ZADD', KEYS[3], due, id)
    call('HDEL', KEYS[2], field)
    call('HDEL', KEYS[1], field)
  end
  reply[#reply + 1] = verdict
end
return reply
