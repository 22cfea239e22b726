-- lead: be the only worker that claims the tasks of a model whose requests must keep their order, or give that back.
-- KEYS  1 leaders   2 workers
-- ARGV  1 wid   2 model   3 "1" to give it back   4 prefix of worker keys
-- Whoever leads does so until it gives it back or is no worker any more: a lost one is none once what it held has
-- returned to its queue, so the next leader finds everything in its order.
-- Returns 0 if another worker leads, 1 if this one does, 2 if it does and others hold claims of the model yet.
local refusal = denied({{'HSET', KEYS[1], 'model', ''}, {'HDEL', KEYS[1], 'model'}})
if refusal then
  return refusal
end
local holder = call('HGET', KEYS[1], ARGV[2])
local mine = holder == ARGV[1]
if ARGV[3] == '1' then
  if mine then
    call('HDEL', KEYS[1], ARGV[2])
  end
  return 0
end
if holder and not mine and call('SISMEMBER', KEYS[2], holder) == 1 then
  return 0
end
for _, worker in ipairs(call('SMEMBERS', KEYS[2])) do
  if worker ~= ARGV[1] then
    local fields = try('HKEYS', ARGV[4] .. worker .. ':inflight')
    for _, field in ipairs(fields.err and {} or fields) do
      if model_of(field) == ARGV[2] then
        if not mine then
          call('HSET', KEYS[1], ARGV[2], ARGV[1])
        end
        return 2
      end
    end
  end
end
if not mine then
  call('HSET', KEYS[1], ARGV[2], ARGV[1])
end
return 1
