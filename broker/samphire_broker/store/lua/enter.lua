-- enter: find out whether a worker may serve the queues of this deployment.
-- KEYS  1 schema   2 samphire.namespace
-- ARGV  1 version of the schema   2 lease in ms
-- Returns {the version that is in use, the namespace whose workers serve the queues}; both are this worker's where
-- nobody was here before. What lies at the second key and is no text is somebody else's: then nobody is told.
local refusal = denied({{'SET', KEYS[1], ''}, {'GET', KEYS[1]}})
if refusal then
  return refusal
end
try('PERSIST', KEYS[1]) -- changes nothing; a write that needs no memory lets the others through when memory is full
local schema = try('GET', KEYS[1])
if not schema then
  call('SET', KEYS[1], ARGV[1])
  schema = ARGV[1]
end
if schema ~= ARGV[1] then
  return {type(schema) == 'string' and schema or 'none: another key lies there', NAMESPACE}
end
try('SET', KEYS[2], NAMESPACE, 'NX', 'PX', ARGV[2])
local holder = try('GET', KEYS[2])
return {schema, type(holder) == 'string' and holder or NAMESPACE}
