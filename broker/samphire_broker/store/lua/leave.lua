-- leave: drop the lease of a worker that ends. If it holds nothing it is no member any more; what it holds after all
-- (a claim of a lost reply) is returned by whoever reaps it.
-- KEYS  1 worker:<wid>   2 worker:<wid>:info   3 worker:<wid>:inflight   4 workers   5 samphire.namespace
-- ARGV  1 wid
-- Returns how many messages it holds. Without a lease nothing more can be claimed, so that is all there will ever be.
local refusal = denied({{'DEL', KEYS[1]}, {'DEL', KEYS[2]}, {'SREM', KEYS[4], ARGV[1]}})
if refusal then
  return refusal
end
local held = call('HLEN', KEYS[3])
call('SCARD', KEYS[4])
call('DEL', KEYS[1], KEYS[2])
if held == 0 then
  call('SREM', KEYS[4], ARGV[1])
end
if call('SCARD', KEYS[4]) == 0 and try('GET', KEYS[5]) == NAMESPACE then
  try('DEL', KEYS[5])
end
return held
