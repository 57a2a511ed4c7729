-- Lists the namespaces whose lease has ended: id, record, id, record, …
--
-- Keys: spaces. Arguments: clock offset, most ids, the name of the key of a space without the id.
local answer = { 'ok' }
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now(ARGV[1]), 'LIMIT', 0, ARGV[2])) do
  local record = redis.call('HGET', ARGV[3] .. id, 'record')
  answer[#answer + 1] = id
  answer[#answer + 1] = record or ''
end
return answer
