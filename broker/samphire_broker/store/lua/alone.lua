-- alone: be the only worker that runs anything of a model, or of all, or give that back.
-- KEYS  1 alone   2 workers
-- ARGV  1 wid   2 the model, "" for all   3 for how long in ms, unless it is asked again; 0 gives it back
--       4 prefix of worker keys   5 number of the hold: a call of an earlier one that comes late changes nothing
-- Nobody else starts anything of the model meanwhile (`start.lua`). It is one key for all models: who needs it is rare.
-- Returns how many tasks of the model other workers have under way, or -1 if another worker is alone, or this one by
-- another hold. Under way is what they have started, and what they have claimed before anything was tried: that they
-- start without being asked.
local refusal = denied({{'SET', KEYS[1], ''}, {'DEL', KEYS[1]}, {'PEXPIRE', KEYS[1], 1}})
if refusal then
  return refusal
end
local holder = try('GET', KEYS[1]) -- a key of another type is nobody's
local mine = ARGV[1] .. ' ' .. ARGV[5] .. ' '
if type(holder) == 'string' and string.sub(holder, 1, #mine) ~= mine then
  return -1
end
if ARGV[3] == '0' then
  call('DEL', KEYS[1])
  return 0
end
local under_way = 0
for _, worker in ipairs(call('SMEMBERS', KEYS[2])) do
  if worker ~= ARGV[1] then
    local key = ARGV[4] .. worker
    local counted = {}
    for _, hash in ipairs({':started', ':inflight'}) do
      local fields = try('HKEYS', key .. hash)
      for _, field in ipairs(fields.err and {} or fields) do
        local counts = hash == ':started' or match(field, '^%d+!')
        if counts and not counted[field] and (ARGV[2] == '' or model_of(field) == ARGV[2]) then
          counted[field] = true
          under_way = under_way + 1
        end
      end
    end
  end
end
call('PEXPIRE', KEYS[1], ARGV[3]) -- needs no memory, and lets the rest through when memory is full
call('SET', KEYS[1], mine .. ARGV[2], 'PX', ARGV[3])
return under_way
