-- health: keep how an endpoint of webhooks fares, and warn operators, once of each level over all workers.
-- KEYS  1 webhook:health   2 webhook:warned   3 operator
-- ARGV  1 endpoint   2 how it fares (JSON, "" for well)   3 level of the warning, 0 for none   4 event (JSON)
--       5 most events
-- Returns 1 where the warning is new, else 0.
local health_key, warned_key, operator_key = KEYS[1], KEYS[2], KEYS[3]
local endpoint, state, level, event, events_max = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local refusal = denied({{'HSET', health_key, 'field', ''}, {'HDEL', health_key, 'field'}})
if refusal then
  return refusal
end
if state == '' then
  call('HDEL', health_key, endpoint)
  try('HDEL', warned_key, endpoint)
  return 0
end
call('HSET', health_key, endpoint, state)
if level > 0 and (tonumber(try('HGET', warned_key, endpoint) or nil) or 0) < level then
  try('HSET', warned_key, endpoint, level)
  try('XADD', operator_key, 'MAXLEN', '~', events_max, '*', 'e', event)
  return 1
end
return 0
