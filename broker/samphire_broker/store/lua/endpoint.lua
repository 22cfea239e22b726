-- endpoint: change what is kept of an endpoint of webhooks, or of a default secret, unless somebody has meanwhile.
-- KEYS  1 webhook:config   2 webhook:names   3 webhook:warned   4 operator
-- ARGV  1 name   2 what it was ("" for nothing)   3 what it is to be ("" for nothing)   4 what producers may read of it
--       5 event for operators (JSON, "" for none)   6 most events   7 "1" to forget what it was warned of
-- Returns 1; 0 where it is something else by now: then nothing is written.
local config_key, names_key, warned_key, operator_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local name, before, after, public, event, events_max, forget_warnings = unpack(ARGV)
if (call('HGET', config_key, name) or '') ~= before then
  return 0
end
local refusal = denied({
  {'HSET', config_key, 'field', ''}, {'HSET', names_key, 'field', ''}, {'HDEL', config_key, 'field'},
  {'HDEL', names_key, 'field'}})
if refusal then
  return refusal
end
if after == '' then
  call('HDEL', config_key, name)
  call('HDEL', names_key, name)
else
  call('HSET', config_key, name, after)
  call('HSET', names_key, name, public)
end
if forget_warnings == '1' then
  try('HDEL', warned_key, name)
end
if event ~= '' then
  try('XADD', operator_key, 'MAXLEN', '~', events_max, '*', 'e', event)
end
return 1
