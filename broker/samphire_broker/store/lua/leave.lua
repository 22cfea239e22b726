-- leave: drop the lease of a worker that ends. If it holds nothing it is no member any more; what it holds after all
-- (a claim of a lost reply) is returned by whoever reaps it.
-- KEYS  1 worker:<wid>   2 worker:<wid>:info   3 worker:<wid>:inflight   4 workers   5 samphire.namespace
-- ARGV  1 wid
-- Returns how many messages it holds. Without a lease nothing more can be claimed, so that is all there will ever be.
local lease_key, info_key, inflight_key, workers_key, mark_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local worker_id = ARGV[1]
local refusal = denied({{'DEL', lease_key}, {'DEL', info_key}, {'SREM', workers_key, worker_id}})
if refusal then
  return refusal
end
local held = call('HLEN', inflight_key)
call('SCARD', workers_key)
call('DEL', lease_key, info_key)
if held == 0 then
  call('SREM', workers_key, worker_id)
end
if call('SCARD', workers_key) == 0 and try('GET', mark_key) == NAMESPACE then
  try('DEL', mark_key)
end
return held
