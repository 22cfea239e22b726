-- alone: be the only worker that runs anything of a model, or of all, or give that back.
-- KEYS  1 alone   2 workers
-- ARGV  1 wid   2 the model, "" for all   3 for how long in ms, unless it is asked again; 0 gives it back
--       4 prefix of worker keys
-- Nobody else starts anything of the model meanwhile (`start.lua`). It is one key for all models: who needs it is rare.
-- Returns how many tasks of the model other workers have started and not ended yet, or -1 if another worker is alone.
local holder = redis.pcall('GET', KEYS[1]) -- a key of another type is nobody's
local mine = ARGV[1] .. ' '
if type(holder) == 'string' and string.sub(holder, 1, #mine) ~= mine then
  return -1
end
if ARGV[3] == '0' then
  redis.call('DEL', KEYS[1])
  return 0
end
local under_way = 0
for _, worker in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  if worker ~= ARGV[1] then
    local fields = redis.pcall('HKEYS', ARGV[4] .. worker .. ':started')
    for _, field in ipairs(fields.err and {} or fields) do
      if ARGV[2] == '' or string.match(field, '^%d+:inference%.([^@\6]*)') == ARGV[2] then
        under_way = under_way + 1
      end
    end
  end
end
redis.call('PEXPIRE', KEYS[1], ARGV[3]) -- needs no memory, and lets the rest through when memory is full
redis.call('SET', KEYS[1], mine .. ARGV[2], 'PX', ARGV[3])
return under_way
