-- alone: be the only worker that runs anything of a model, or of all, or give that back.
-- KEYS  1 alone   2 workers
-- ARGV  1 wid   2 the model, "" for all   3 for how long in ms, unless it is asked again; 0 gives it back
--       4 prefix of worker keys   5 number of the hold: a call of an earlier one that comes late changes nothing
-- Nobody else starts anything of the model meanwhile (`start.lua`). It is one key for all models: who needs it is rare.
-- Returns how many tasks of the model other workers have under way, or -1 if another worker is alone, or this one by
-- another hold. Under way is what they have started, and what they have claimed before anything was tried: that they
-- start without being asked.
local alone_key, workers_key = KEYS[1], KEYS[2]
local worker_id, model, for_ms, worker_prefix, hold = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local refusal = denied({{'SET', alone_key, ''}, {'DEL', alone_key}, {'PEXPIRE', alone_key, 1}})
if refusal then
  return refusal
end
local holder = try('GET', alone_key) -- a key of another type is nobody's
local mine = worker_id .. ' ' .. hold .. ' '
if type(holder) == 'string' and string.sub(holder, 1, #mine) ~= mine then
  return -1
end
if for_ms == '0' then
  call('DEL', alone_key)
  return 0
end
local under_way = 0
for _, worker in ipairs(call('SMEMBERS', workers_key)) do
  if worker ~= worker_id then
    local key = worker_prefix .. worker
    local counted = {}
    for _, hash in ipairs({':started', ':inflight'}) do
      local fields = try('HKEYS', key .. hash)
      for _, field in ipairs(fields.err and {} or fields) do
        local counts = hash == ':started' or match(field, '^%d+!')
        if counts and not counted[field] and (model == '' or model_of(field) == model) then
          counted[field] = true
          under_way = under_way + 1
        end
      end
    end
  end
end
call('PEXPIRE', alone_key, for_ms) -- needs no memory, and lets the rest through when memory is full
call('SET', alone_key, mine .. model, 'PX', for_ms)
return under_way
