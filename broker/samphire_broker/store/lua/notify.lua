-- notify: put out webhooks that tell of tasks that are under way.
-- With: outbox
-- KEYS  1 worker:<wid>:inflight
-- ARGV  1 prefix of task hashes   2 channel to wake lanes   3 MessagePack: array of [claim, task id, entry]
-- What was put out before is not put out again, and nothing of a task that is another worker's by now.
-- Returns how many could not be pushed: nobody is told of these.
local inflight_key = KEYS[1]
local task_prefix, wake_channel, packed = ARGV[1], ARGV[2], ARGV[3]
local count = 0
begin_to_write(inflight_key)
for _, wish in ipairs(cmsgpack.unpack(packed)) do
  local field, id, entry = wish[1], wish[2], wish[3]
  if call('HEXISTS', inflight_key, field) == 1 then
    local is_out = put_out(entry, tonumber(try('HGET', task_prefix .. id, 'run') or nil), wake_channel)
    count = count + (is_out and 0 or 1)
  end
end
return count
