-- beat: keep a worker's lease alive.
-- KEYS  1 worker:<wid>   2 worker:<wid>:info   3 workers
-- ARGV  1 wid   2 lease in ms   3 info
-- Returns the new value of the lease's counter; 1 means that the lease had been lost, or is new.
redis.call('PEXPIRE', KEYS[1], ARGV[2]) -- needs no memory, and lets the rest through when memory is full
redis.call('SADD', KEYS[3], ARGV[1])
local beat = redis.call('INCR', KEYS[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[2])
return beat
