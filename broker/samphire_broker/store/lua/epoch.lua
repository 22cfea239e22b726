-- epoch: see that positions in logs are of this run of the broker, as far as they need to be.
-- KEYS  1 epoch
-- ARGV  1 id of the broker's run   2 "1" where it loses nothing that it has answered (appendfsync always)
-- What was read of a log before a restart may be lost, and its place given to something else. So positions begin with an
-- epoch, and a restart begins another, unless nothing can be lost. It is set before anything else is written.
-- Returns the epoch.
local run_id = ARGV[1]
local stored = try('GET', KEYS[1])
local epoch, known = match(type(stored) == 'string' and stored or '', '^(%w+) (%w+)$')
if known ~= run_id then
  epoch = ARGV[2] == '1' and epoch or string.sub(run_id, 1, 12)
  call('DEL', KEYS[1]) -- a write that needs no memory lets the others through when memory is full
  call('SET', KEYS[1], epoch .. ' ' .. run_id)
end
return epoch
