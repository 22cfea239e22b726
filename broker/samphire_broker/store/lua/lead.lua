-- lead: be the only worker that claims the tasks of a model whose requests must keep their order, or give that back.
-- KEYS  1 leaders   2 workers
-- ARGV  1 wid   2 model   3 "1" to give it back   4 prefix of worker keys   5 "1": this worker was told already that it
--       leads alone, so claims of others are not looked for while it does
-- Whoever leads does so until it gives it back or is no worker any more: a lost one is none once what it held has
-- returned to its queue, so the next leader finds everything in its order.
-- Returns 0 if another worker leads, 1 if this one does, 2 if it does and others hold claims of the model yet.
local leaders_key, workers_key = KEYS[1], KEYS[2]
local worker_id, model, give_back, worker_prefix, is_alone = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local refusal = denied({{'HSET', leaders_key, 'model', ''}, {'HDEL', leaders_key, 'model'}})
if refusal then
  return refusal
end
local holder = call('HGET', leaders_key, model)
local mine = holder == worker_id
if give_back == '1' then
  if mine then
    call('HDEL', leaders_key, model)
  end
  return 0
end
if mine and is_alone == '1' then
  return 1
end
if holder and not mine and call('SISMEMBER', workers_key, holder) == 1 then
  return 0
end
for _, worker in ipairs(call('SMEMBERS', workers_key)) do
  if worker ~= worker_id then
    local fields = try('HKEYS', worker_prefix .. worker .. ':inflight')
    for _, field in ipairs(fields.err and {} or fields) do
      if model_of(field) == model then
        if not mine then
          call('HSET', leaders_key, model, worker_id)
        end
        return 2
      end
    end
  end
end
if not mine then
  call('HSET', leaders_key, model, worker_id)
end
return 1
