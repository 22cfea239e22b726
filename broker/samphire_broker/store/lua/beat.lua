-- beat: keep a worker's lease alive.
-- KEYS  1 worker:<wid>   2 worker:<wid>:info   3 workers   4 samphire.namespace
-- ARGV  1 wid   2 lease in ms   3 info
-- Returns the new value of the lease's counter; 1 means that the lease had been lost, or is new.
local refusal = denied({{'INCR', KEYS[1]}, {'PEXPIRE', KEYS[1], 1}, {'SET', KEYS[2], ''}, {'SADD', KEYS[3], ARGV[1]}})
if refusal then
  return refusal
end
call('SCARD', KEYS[3]) -- fails before the first write if the key is of another type
call('PEXPIRE', KEYS[1], ARGV[2]) -- needs no memory, and lets the rest through when memory is full
call('SADD', KEYS[3], ARGV[1])
local beat = call('INCR', KEYS[1])
call('PEXPIRE', KEYS[1], ARGV[2])
call('SET', KEYS[2], ARGV[3], 'PX', ARGV[2])
-- It says whose the queues are for as long as one of us lives; an outage may have been longer than its lifetime.
try('SET', KEYS[4], NAMESPACE, 'NX', 'PX', ARGV[2])
if try('GET', KEYS[4]) == NAMESPACE then
  try('PEXPIRE', KEYS[4], ARGV[2])
end
return beat
