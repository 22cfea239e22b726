-- delete: delete results that were read.
-- KEYS  1 sub:deletes
-- ARGV  1 prefix of result keys   2 prefix of claim checks of outputs   3 what stands in a result's place (JSON)
--       4 most requests
-- That the task has succeeded stays known, and as long as its result would have. Returns the number of requests.
if call('TYPE', KEYS[1]).ok ~= 'list' then
  return 0
end
local refusal = denied({
  {'SET', ARGV[1] .. 'id', ''}, {'UNLINK', NAMESPACE .. ARGV[2] .. 'id'}, {'LTRIM', KEYS[1], 0, -1}})
if refusal then
  return refusal
end
local ids = call('LRANGE', KEYS[1], 0, ARGV[4] - 1)
call('LTRIM', KEYS[1], 0, -1) -- a write that needs no memory lets the others through when memory is full
for n = 1, #ids do
  local key = ARGV[1] .. ids[n]
  local meta = try('GET', key)
  if state_in(meta) == 'SUCCESS' then
    for blob in string.gmatch(meta, '"key":"([^"]*)"') do
      local begins = string.sub(blob, 1, #ARGV[2]) == ARGV[2]
      if begins and string.find(blob, ':' .. ids[n] .. ':', #ARGV[2], true) then
        try('UNLINK', NAMESPACE .. blob)
      end
    end
    local id = cjson.encode(ids[n])
    local rest = match(meta, '.*(,"traceback":.*)$') or ',"traceback":null,"children":[],"date_done":null}'
    call('SET', key, '{"status":"SUCCESS","task_id":' .. id .. ',"result":' .. ARGV[3] .. rest, 'KEEPTTL')
  end
end
call('LTRIM', KEYS[1], #ids, -1)
return #ids
