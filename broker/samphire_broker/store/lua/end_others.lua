-- end_others: end tasks that no worker holds: what Celery's own code ends for others, as the body of a chord that
-- fails.
-- With: ended, log, outbox
-- KEYS  1 ended   2 ended:before   3 ended:turn   4 tried
-- ARGV  1 prefix of result keys   2 lifetime of results in s   3 longest event stream   4 lifetime of streams in s
--       5 prefix of task hashes   6 how long it is remembered that a task has ended, in s
--       7 channel to wake lanes
--       8.. task id, state, result (JSON), stream ("" for none), webhooks (MessagePack: array of entries), task id, …
-- Returns for each task 1, 2 where a webhook of it could not be pushed, or 0 where it has ended already: no end is
-- written over.
local ended_key, ended_before_key, ended_turn_key, tried_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local meta_prefix, result_ttl_s, stream_max, stream_ttl_s, task_prefix = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local remember_s, wake_channel = ARGV[6], ARGV[7]
local first_id = ARGV[8]
local refusal = denied({{'SETEX', meta_prefix .. first_id, 1, ''}})
if refusal then
  return refusal
end
local reply, ends = {}, {}
for i = 8, #ARGV, 5 do
  local id, state, meta, stream = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local key = meta_prefix .. id
  local before = state_in(try('GET', key))
  local has_ended = before == 'SUCCESS' or before == 'FAILURE' or before == 'REVOKED'
  has_ended = has_ended or (not before and recall(ended_key, ended_before_key, {id})[1])
  if has_ended then
    reply[#reply + 1] = 0
  else
    call('SETEX', key, result_ttl_s, meta)
    try('PUBLISH', key, meta)
    local run = try('SREM', tried_key, id) == 1 and tonumber(try('HGET', task_prefix .. id, 'run') or nil)
    log_end(id, state, run or 1, result_ttl_s)
    if run then
      try('UNLINK', task_prefix .. id)
      tell(stream_for(id, stream), stream_max, stream_ttl_s, state, id, 'run', run)
    else
      tell(stream_for(id, stream), stream_max, stream_ttl_s, state, id)
    end
    ends[#ends + 1], ends[#ends + 2] = id, LETTERS[state] .. (run or '')
    local verdict = 1
    for _, entry in ipairs(cmsgpack.unpack(ARGV[i + 4])) do
      verdict = put_out(entry, run or 1, wake_channel) and verdict or 2
    end
    reply[#reply + 1] = verdict
  end
end
remember(ended_key, ended_before_key, ended_turn_key, tonumber(remember_s), ends)
return reply
