-- enter: find out whether a worker may serve the queues of this deployment.
-- KEYS  1 schema   2 samphire.namespace
-- ARGV  1 version of the schema   2 lease in ms
-- Returns {the version that is in use, the namespace whose workers serve the queues}; both are this worker's where
-- nobody was here before. What lies at the second key and is no text is somebody else's: then nobody is told.
local schema_key, mark_key = KEYS[1], KEYS[2]
local own_schema, lease_ms = ARGV[1], ARGV[2]
local refusal = denied({{'SET', schema_key, ''}, {'GET', schema_key}})
if refusal then
  return refusal
end
try('PERSIST', schema_key) -- changes nothing; a write that needs no memory lets the others through when memory is full
local schema = try('GET', schema_key)
if not schema then
  call('SET', schema_key, own_schema)
  schema = own_schema
end
if schema ~= own_schema then
  return {type(schema) == 'string' and schema or 'none: another key lies there', NAMESPACE}
end
try('SET', mark_key, NAMESPACE, 'NX', 'PX', lease_ms)
local holder = try('GET', mark_key)
return {schema, type(holder) == 'string' and holder or NAMESPACE}
