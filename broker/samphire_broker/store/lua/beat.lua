-- beat: keep a worker's lease alive.
-- KEYS  1 worker:<wid>   2 worker:<wid>:info   3 workers   4 samphire.namespace
-- ARGV  1 wid   2 lease in ms   3 info
-- Returns the new value of the lease's counter; 1 means that the lease had been lost, or is new.
local lease_key, info_key, workers_key, mark_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local worker_id, lease_ms, info = ARGV[1], ARGV[2], ARGV[3]
local refusal = denied({
  {'INCR', lease_key}, {'PEXPIRE', lease_key, 1}, {'SET', info_key, ''}, {'SADD', workers_key, worker_id}})
if refusal then
  return refusal
end
call('SCARD', workers_key) -- fails before the first write if the key is of another type
call('PEXPIRE', lease_key, lease_ms) -- needs no memory, and lets the rest through when memory is full
call('SADD', workers_key, worker_id)
local beat = call('INCR', lease_key)
call('PEXPIRE', lease_key, lease_ms)
call('SET', info_key, info, 'PX', lease_ms)
-- It says whose the queues are for as long as one of us lives; an outage may have been longer than its lifetime.
try('SET', mark_key, NAMESPACE, 'NX', 'PX', lease_ms)
if try('GET', mark_key) == NAMESPACE then
  try('PEXPIRE', mark_key, lease_ms)
end
return beat
