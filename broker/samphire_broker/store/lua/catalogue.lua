-- catalogue: tell clients what the endpoints of a worker serve, and take out what no worker tells any more.
-- KEYS  1 catalogue   2 workers
-- ARGV  1 wid   2 lifetime in s   3.. field, value, …
-- The names of what a worker has told stand in the field "@<wid>" for as long as it is a worker: one that has ended
-- takes nothing out itself.
local catalogue_key, workers_key = KEYS[1], KEYS[2]
local worker_id, ttl_s = ARGV[1], ARGV[2]
local refusal = denied({{'HSET', catalogue_key, 'field', ''}, {'HDEL', catalogue_key, 'field'}})
if refusal then
  return refusal
end
local own_field = '@' .. worker_id
local told, names = {}, {}
for i = 3, #ARGV, 2 do
  told[ARGV[i]] = true
  names[#names + 1] = ARGV[i]
end
local fields = call('HKEYS', catalogue_key)
for _, field in ipairs(fields) do
  local worker = match(field, '^@(.+)$')
  if worker and worker ~= worker_id and call('SISMEMBER', workers_key, worker) == 1 then
    told[field] = true
    for name in string.gmatch(call('HGET', catalogue_key, field), '[^%z]+') do
      told[name] = true
    end
  end
end
for _, field in ipairs(fields) do
  if not told[field] then
    call('HDEL', catalogue_key, field)
  end
end
if #names == 0 then
  return
end
for i = 3, #ARGV, 2 do
  call('HSET', catalogue_key, ARGV[i], ARGV[i + 1])
end
call('HSET', catalogue_key, own_field, table.concat(names, '\0'))
call('EXPIRE', catalogue_key, ttl_s)
