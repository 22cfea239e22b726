-- delete: delete results that were read.
-- KEYS  1 sub:deletes
-- ARGV  1 prefix of result keys   2 prefix of claim checks of outputs   3 what stands in a result's place (JSON)
--       4 most requests
-- That the task has succeeded stays known, and as long as its result would have. Returns the number of requests.
local deletes_key = KEYS[1]
local meta_prefix, blob_prefix, deleted_result, requests_max = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if call('TYPE', deletes_key).ok ~= 'list' then
  return 0
end
local refusal = denied({
  {'SET', meta_prefix .. 'id', ''}, {'UNLINK', NAMESPACE .. blob_prefix .. 'id'}, {'LTRIM', deletes_key, 0, -1}})
if refusal then
  return refusal
end
local ids = call('LRANGE', deletes_key, 0, requests_max - 1)
call('LTRIM', deletes_key, 0, -1) -- a write that needs no memory lets the others through when memory is full
for n = 1, #ids do
  local key = meta_prefix .. ids[n]
  local meta = try('GET', key)
  if state_in(meta) == 'SUCCESS' then
    for blob in string.gmatch(meta, '"key":"([^"]*)"') do
      local begins = string.sub(blob, 1, #blob_prefix) == blob_prefix
      if begins and string.find(blob, ':' .. ids[n] .. ':', #blob_prefix, true) then
        try('UNLINK', NAMESPACE .. blob)
      end
    end
    local id = cjson.encode(ids[n])
    local rest = match(meta, '.*(,"traceback":.*)$') or ',"traceback":null,"children":[],"date_done":null}'
    call('SET', key, '{"status":"SUCCESS","task_id":' .. id .. ',"result":' .. deleted_result .. rest, 'KEEPTTL')
  end
end
call('LTRIM', deletes_key, #ids, -1)
return #ids
